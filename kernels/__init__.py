"""Operators with a torch reference each; hardware kernels register beside them (`registry`)."""

# One module per op under this name; importing it registers the op's implementations.
ALL_OPS = (
    "add_rmsnorm",
    "decode_attention",
    "exit_gate",
    "exit_head",
    "int8_linear",
    "kv_fill",
    "rope_write",
    "skip_mlp",
)

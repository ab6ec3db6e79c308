"""The language model inside a Hugging Face vision-language model, as a causal language model.

Such a model turns images into embeddings, puts them where the prompt has placeholders, and runs an
ordinary decoder over the result. That decoder is what adaptive depth works on. What it is given is
taken from the model's own ``forward`` (`LanguageTower.inputs_of`), which is stopped where the
decoder would begin: nothing of how a family reads images is written here again. What a decoder is
given beside embeddings and positions is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deliberate.modeling.probe import TOLERANCE
from deliberate.modeling.seen_rows import SeenRows
from deliberate.utils.errors import DeliberateError

# Whether this thread wants what the decoder is given, in place of what it makes of it.
_CAPTURING: ContextVar[bool] = ContextVar("capturing", default=False)
_PROBED = 8


class _Captured(Exception):
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__("not an error: the inputs of the decoder")
        self.given = given


def _capture(_decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _CAPTURING.get():
        raise _Captured(kwargs | {f"argument {place}": one for place, one in enumerate(args)})


class LanguageTower(PreTrainedModel, GenerationMixin):
    """A vision-language model's decoder and head under the names of a causal language model.

    Args:
        seeing: the whole model; it keeps its weights.

    Attributes:
        seeing: the whole model.
        seen: embeddings of the images that were shown to it, under ids past its vocabulary.

    Raises:
        DeliberateError: it has no decoder or head of its own, or its logits of text alone are not
            those that decoder and head give.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, seeing: PreTrainedModel) -> None:
        config: Any = seeing.config
        text = config.get_text_config(decoder=True)
        super().__init__(text)
        self.seeing = seeing
        decoder: Any = seeing.get_decoder()
        embedding = decoder.get_input_embeddings()
        if seeing.get_output_embeddings() is None or decoder is seeing or embedding is None:
            raise DeliberateError(
                f"{type(seeing).__name__} has no decoder with a language-model head of its own; "
                "load the model with AutoModelForImageTextToText"
            )
        text._name_or_path = getattr(config, "_name_or_path", "")
        self.generation_config = seeing.generation_config
        self.seen = SeenRows(int(embedding.num_embeddings))
        self._no_split_modules = seeing._no_split_modules
        self._hook = self.base_model.register_forward_pre_hook(_capture, with_kwargs=True)
        self._check_text()
        self.train(seeing.training)

    @property
    def base_model(self) -> nn.Module:
        """The decoder: embedding, layers, final norm."""
        decoder: Any = self.seeing.get_decoder()
        inner: nn.Module = decoder.base_model
        return inner

    def get_input_embeddings(self) -> nn.Module:
        """Of the decoder."""
        embedding: nn.Module = self.base_model.get_input_embeddings()  # type: ignore[operator]
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.seeing.get_output_embeddings()
        return head

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the whole model."""
        self.seeing.save_pretrained(*args, **kwargs)

    def detached(self) -> PreTrainedModel:
        """The whole model as it was: this class leaves nothing on it."""
        self._hook.remove()
        return self.seeing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, n, V]`` of text, and of images where pixels are given."""
        if any("pixel" in name for name in kwargs):
            whole: CausalLMOutputWithPast = self.seeing(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
            return whole
        made = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.get_output_embeddings()(made.last_hidden_state[:, -logits_to_keep:])
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return CausalLMOutputWithPast(logits=logits, past_key_values=made.past_key_values)

    @torch.no_grad()
    def inputs_of(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What the decoder would be given: embeddings ``[B, n, d]`` of text and images, and
        rotary positions ``[3, B, n]``; None where those are 0, 1, 2, ... of each prompt.

        Args:
            given: input_ids ``[B, n]``, attention_mask and whatever the model reads beside them.

        Raises:
            DeliberateError: the model cannot read this, or its decoder is given more than
                embeddings: positions other than those of M-RoPE, a mask, further states.
        """
        name = type(self.seeing).__name__
        begun = _CAPTURING.set(True)
        try:
            self.seeing(**given, use_cache=False)
        except _Captured as captured:
            found = captured.given
        except Exception as error:  # of the model's own forward, of whatever kind
            reason = " ".join(str(error).split())[:160]
            raise DeliberateError(
                f"{name} cannot read {', '.join(given)} ({type(error).__name__}: {reason})"
            ) from None
        else:
            raise DeliberateError(f"{name} does not run its decoder on what it makes of images")
        finally:
            _CAPTURING.reset(begun)
        ids: Tensor = given["input_ids"]
        embedded = found.pop("inputs_embeds", None)
        if not isinstance(embedded, Tensor) or embedded.shape[:2] != ids.shape:
            raise DeliberateError(
                f"{name} gives its decoder no embedding for each of the prompt's "
                f"{ids.shape[1]} tokens: its images cannot be put at positions of the prompt"
            )
        positions = self._positions(
            found.pop("position_ids", None), given.get("attention_mask"), ids
        )
        mask = found.pop("attention_mask", None)
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
            raise DeliberateError(
                f"{name} gives its decoder an attention mask of its own, as where the tokens of an "
                "image attend to one another in both directions: only causal attention is run; "
                "prompts of text alone are"
            )
        more = sorted(name for name, one in found.items() if _holds_tensors(one))
        if more:
            raise DeliberateError(
                f"{name} gives its decoder {', '.join(more)} beside the embeddings, which layers "
                "that are run one by one do not take; prompts of text alone are run"
            )
        return embedded, positions

    def _positions(self, positions: Any, mask: Any, ids: Tensor) -> Tensor | None:
        if positions is None:
            return None
        every = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        plain = every.cumsum(-1) - 1
        if not bool(((positions.to(ids.device) - plain) * every).any()):
            return None
        if positions.shape == (3, *ids.shape):
            made: Tensor = positions
            return made
        raise DeliberateError(
            f"{type(self.seeing).__name__} places images at positions {list(positions.shape)}; "
            "those of M-RoPE, three a token, are supported; prompts of text alone are run"
        )

    @torch.no_grad()
    def _check_text(self) -> None:
        """Raises DeliberateError where the whole model's logits of text are not decoder's."""
        was = self.seeing.training
        self.seeing.eval()
        special = set(_token_ids(self.seeing.config))
        plain = [one for one in range(self.seen.first) if one not in special][:1024]
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))[:_PROBED]
        embedding: Any = self.get_input_embeddings()
        ids = torch.tensor([[plain[one] for one in order.tolist()]], device=embedding.weight.device)
        name = type(self.seeing).__name__
        try:
            own = self.seeing(input_ids=ids, use_cache=False).logits
            ours = self(input_ids=ids, use_cache=False).logits
        except Exception as error:  # of whatever kind a family raises without an image
            reason = " ".join(str(error).split())[:160]
            raise DeliberateError(
                f"{name} is not supported: its decoder does not run on text alone "
                f"({type(error).__name__}: {reason})"
            ) from None
        finally:
            self.seeing.train(was)
        limit = TOLERANCE.get(own.dtype, TOLERANCE[torch.bfloat16])
        spread = float(own.double().std()) or 1.0
        same = own.shape == ours.shape
        worst = float((own - ours).abs().max()) / spread if same else float("inf")
        if not worst <= limit:
            raise DeliberateError(
                f"{name} is not supported: its logits differ from those of its decoder and head by "
                f"{worst:.2g} standard deviations"
            )


def language_tower(model: PreTrainedModel) -> PreTrainedModel:
    """A causal language model as it is; of a vision-language model its language tower.

    Raises:
        DeliberateError: as `LanguageTower`.
    """
    config: Any = model.config
    if isinstance(model, LanguageTower) or not sees(config):
        return model
    return LanguageTower(model)


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """What was given to `language_tower`, as it was."""
    return model.detached() if isinstance(model, LanguageTower) else model


def sees(config: Any) -> bool:
    """Whether a configuration is of a model that has a language model inside."""
    inner = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return inner is not config and getattr(config, "vision_config", None) is not None


def _holds_tensors(one: Any) -> bool:
    if isinstance(one, list | tuple):
        return any(map(_holds_tensors, one))
    if isinstance(one, Mapping):
        return any(map(_holds_tensors, one.values()))
    return isinstance(one, Tensor)


def _token_ids(config: Any) -> list[int]:
    """Ids that the configuration names, such as that of an image's placeholder."""
    named = vars(config)
    return [
        one
        for name, one in named.items()
        if isinstance(one, int) and ("token_id" in name or name.endswith("token_index"))
    ]

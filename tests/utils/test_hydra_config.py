"""Configurations: every preset composes and is possible; every mistake is one line."""

from __future__ import annotations

import json
from importlib import resources

import pytest
from hydra.core.global_hydra import GlobalHydra
from tiny_models import VOCAB, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deliberate.api.model import AdaptiveModel
from deliberate.train.checks import check_config, check_output
from deliberate.train.recipes import RECIPES
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

OFFLINE = ["data=words", "data.max_tokens=100", "output_dir=never/made"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock checkpoint and one with exits, both of 4 layers; weights are never read here."""
    root = tmp_path_factory.mktemp("models")
    base = tiny_model("llama", layers=4)
    base.save_pretrained(root / "stock")
    AdaptiveModel(base, [1, 2]).save_pretrained(root / "adaptive", merge=True)
    for weights in root.glob("*/*.safetensors"):
        weights.unlink()
    for model in ("stock", "adaptive"):
        save_tokenizer(root / model, VOCAB)
    save_tokenizer(root / "larger", VOCAB + 3)
    return root


def save_tokenizer(folder, size):
    """A tokenizer of so many one-word tokens."""
    words = {f"w{number}": number for number in range(size - 2)} | {
        "<s>": size - 2,
        "</s>": size - 1,
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def checked(*overrides):
    check_config(compose("train", [*OFFLINE, *overrides]))


def heads(folder, *overrides):
    return ["recipe=heads", "model=folder", f"model.path='{folder}'", *overrides]


def refused(*overrides):
    with pytest.raises(DeliberateError) as error:
        checked(*overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


EXPERIMENTS = sorted(
    path.name.removesuffix(".yaml")
    for path in (resources.files("deliberate.configs") / "experiment").iterdir()
    if path.name != "smollm2_draft.yaml"  # `deliberate fit`: tests/train/test_draft_recipe.py
)


@pytest.mark.parametrize(
    "preset",
    ["seed=1", "debug=fast", "debug=dry_run", "logger=wandb",
     *(f"+experiment={name}" for name in EXPERIMENTS)],
)  # fmt: skip
def test_every_preset_composes_and_passes_its_checks(preset):
    if preset == "logger=wandb":
        pytest.importorskip("wandb")
    if "lora" in preset:
        pytest.importorskip("peft")
    named = ("heads", "layerskip", "lora", "sweep", "smollm2_layerskip")
    needs_a_path = preset.removeprefix("+experiment=") in named
    changed = ["model.path=tiny"] if needs_a_path else []
    if preset == "+experiment=smollm2_distill":  # its layers are those of SmolLM2
        changed = ["model.path=tiny", "model.keep_layers=[1,2,3,5]", "exits.layers=[2]"]
        changed.append("data.files.file.path=own.jsonl")
    if preset == "+experiment=smollm2_qat":
        changed = ["model.path=tiny", "exits.layers=auto", "data.files.file.path=own.jsonl"]
    cfg = compose("train", [preset, *changed])
    cfg.output_dir = "never/made"
    cfg.data.weights, cfg.data.files = {"words": 1.0}, {}  # the other sources need files
    check_config(cfg)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_short_with_debug_fast(name):
    for plus in ("", "+"):
        cfg = compose("train", [f"{plus}experiment={name}", "debug=fast", "model.path=tiny"])
        assert (cfg.trainer.max_steps, cfg.trainer.processes) == (2, 1)
        assert cfg.trainer.tokens_per_step <= 512 and cfg.exits.layers == "auto"
        plain = compose("train", [f"{plus}experiment={name}", "model.path=tiny"])
        assert (cfg.recipe, cfg.output_dir) == (plain.recipe, plain.output_dir)
    cfg = compose("train", [f"+experiment={name}", "debug=fast", "model.path=tiny",
                            "trainer.max_steps=7"])  # fmt: skip
    assert cfg.trainer.max_steps == 7


def test_every_recipe_has_an_experiment():
    assert {compose("train", [f"+experiment={name}", "model.path=tiny"]).recipe.name
            for name in EXPERIMENTS} == set(RECIPES)  # fmt: skip


def test_the_experiment_trains_exits_that_its_model_can_have():
    cfg = compose("train", ["+experiment=tiny"])
    assert cfg.recipe.name == "pretrain" and len(cfg.exits.layers) >= 3
    assert cfg.model.layers >= 8 and max(cfg.exits.layers) < cfg.model.layers


def test_a_folder_with_and_without_exits_passes_without_its_weights_being_read(folders):
    checked(*heads(folders / "stock", "exits.layers=[1,3]"))
    checked(*heads(folders / "adaptive"))
    checked(*heads(folders / "adaptive", "exits.layers=[1,2]"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.max_step=3", "trainer.max_steps"),
        ("trainer.max_steps=[1", "trainer.max_steps=[1"),
        ("nonsense", "nonsense"),
        (
            "recipe=dropout",
            "recipe=dropout is unknown: there is distill, draft, gate, heads, layerskip, lora, "
            "pretrain",
        ),
        ("recipe=layerskp", "did you mean layerskip?"),
        ("+experiment=tyny", "experiment=tyny is unknown (did you mean tiny?): there is distill"),
        ("recipe.name=dropout", "pretrain, qat, or an importable module"),
        ("recipe=distill", "recipe.teacher"),
        ("recipe.wide_below=0.9", "recipe.wide_below' is now called recipe.initial_threshold"),
        ("recipe=layerskip", "model=folder"),
        ("recipe=lora", "model=folder"),
        ("resume=maybe", "resume='maybe'"),
        ("trainer.fsdp=true", "trainer.processes=2"),
        ("data.chat=true", "chat template"),
        ("data.loss_on=prompt", "data.loss_on='prompt'"),
        ("data=self", "model=folder"),
        ("data=text", "/no/such/folder"),
        ("+recipe.depth=3", "recipe.depth"),
        ("recipe.scale=cubic", "'cubic'"),
        ("recipe.early_scale=-1", "recipe.early_scale=-1"),
        ("recipe.layer_dropout=1", "recipe.layer_dropout=1"),
        ("recipe=heads", "model=folder"),
        ("exits.layers=[2,99]", "exit layer 99"),
        ("exits.layers=[3,2]", "[3, 2]"),
        ("exits.thresholds=1.5", "1.5"),
        ("exits.measure=luck", "'luck'"),
        ("+exits.depth=3", "exits.depth"),
        ("trainer.max_steps=-1", "trainer.max_steps=-1"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5"),
        ("trainer.processes=0", "trainer.processes=0"),
        ("trainer.processes=3", "multiple of trainer.processes=3"),
        ("trainer.learning_rate=0", "trainer.learning_rate=0"),
        ("trainer.learning_rate=fast", "trainer.learning_rate=fast"),
        ("trainer.decay_share=1.1", "trainer.decay_share=1.1"),
        ("trainer.curriculum=-0.1", "trainer.curriculum=-0.1"),
        ("trainer.optimizer=sgd", "adamw, muon"),
        ("trainer.attention=flash", "eager, sdpa"),
        ("trainer.bf16=perhaps", "auto, true, false"),
        ("seed=-1", "seed=-1"),
        ("model.kind=cloud", "'cloud'"),
        ("model.heads=5", "5 heads"),
        ("model.kv_heads=3", "model.kv_heads=3"),
        ("model.vocab_size=100", "model.vocab_size=100"),
        ("model.layers=1", "1 layer"),
        ("data.max_tokens=5000", "1024 positions"),
        ("data.weights.words=-1", "words]=-1"),
        ("data.weights.words=0", "data=words"),
        ("data.prompt=Hello", "{question}"),
        ("data.prompt='{question} {answer}'", "{answer}"),
        ("+data.weights={gym/gsm_symbolic: 1}", "gsm_symbolic"),
        ("+data.weights={gym/chain_sun: 1}", "chain_sum"),
        ("+data.weights={math500: 1}", "math500"),
        ("+data.weights={poems: 1}", "'poems'"),
        ("+data.files.poems.path=x.jsonl", "data.files.poems is read by no source"),
        ("+data.files={poems: {pat: x}}", "data.files.poems is read by no source"),
        ("+data.hub.gsm8k=openai/gsm8k", "data.hub.gsm8k is read by no source"),
        ("+data.weights={gsm8k: 1}", "/no/such/folder"),
        ("logger=tensorboard", "logger=tensorboard is unknown"),
        ("+sead=1", "there is no setting 'sead': did you mean seed?"),
        ("nonsense=3", "there is no setting 'nonsense': the settings are "),
    ],
)
def test_a_mistake_is_one_line_that_names_it(override, named):
    assert named in refused("data.dir=/no/such/folder", override)


@pytest.mark.parametrize("name", ["eval", "bench", "calibrate", "train"])
@pytest.mark.parametrize("added", ["+kv_storage=foo", "++kv_storage=foo", "+kv_storage.of=1"])
def test_a_setting_that_nothing_reads_is_refused_with_a_plus_too(name, added):
    with pytest.raises(DeliberateError, match="there is no setting 'kv_storage'"):
        compose(name, [added])


@pytest.mark.parametrize(
    ("name", "added", "named"),
    [
        ("eval", "+budget.ms=3", "'budget.ms': the settings are budget.ms_per_token"),
        ("eval", "+graders.many=3", "'graders.many': the settings are graders.processes"),
        ("eval", "+data={folder: x}", "'data.folder': the settings are data.dir, data.hub"),
        ("eval", "+task@other=words", "'other': the settings are budget"),
        ("eval", "graders.zzz=3", "'graders.zzz': the settings are graders.processes"),
        ("eval", "hydra.run.dir=x", "hydra.run.dir is Hydra's own setting, which only train reads"),
        ("calibrate", "++graders.many=3", "'graders.many'"),
        ("bench_serve", "+identity.many=3", "'identity.many': the settings are identity.requests"),
        ("fit", "+draft.rank=3", "'draft.rank': the settings are draft.train"),
        ("train", "+trainer.steps=3", "'trainer.steps': the settings are trainer.max_steps"),
        ("train", "+model.tokenizer=x", "'model.tokenizer': the settings are model.kind"),
        ("train", "+logger.tags=x", "'logger.tags': the settings are logger.name"),
        ("train", "+hydra.x=1", "'hydra.x': hydra has defaults, mode"),
        ("train", "++hydra.run.x=1", "'hydra.run.x': hydra.run has dir"),
        ("train", "+data.self.many=3", "'data.self.many': the settings are data.self.questions"),
    ],
)
def test_a_setting_of_a_section_that_nothing_reads_is_refused_too(name, added, named):
    needed = ["model=tiny", "out=x"] if name == "fit" else []
    with pytest.raises(DeliberateError) as raised:
        compose(name, [*needed, added], verbatim=("model",) if needed else ())
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_group_has_beyond_the_default_is_known():
    compose("train", ["model=folder", "model.path=tiny", "++model.tokenizer=x"])
    with pytest.raises(DeliberateError, match=r"'recipe\.fit\.draft\.rank'"):
        given = ["recipe=draft", "recipe.fit.model=tiny", "recipe.fit.out=x"]
        compose("train", [*given, "+recipe.fit.draft.rank=3"])


def test_a_setting_that_there_is_may_have_a_plus():
    compose("train", ["+hydra.job.env_set.NAME=x", "++hydra.run.dir=y", "+hydra.callbacks.a.b=1"])
    cfg = compose("eval", ["++seed=3", "task=gym", "+task.params.most=2", "+budget.tiers.L4=3000"])
    assert cfg.seed == 3 and cfg.task.params.most == 2 and cfg.budget.tiers.L4 == 3000
    assert compose("bench_floor", ["+sizes.small={hidden_size: 64}"]).sizes.small.hidden_size == 64


def test_a_model_that_cannot_be_used_is_one_line(folders, tmp_path, monkeypatch):
    assert "no value" in refused("recipe=heads", "model=folder")
    assert "/no/such/model" in refused(*heads("/no/such/model"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(*heads(tmp_path / "empty"))
    assert "scratch" in refused("model=folder", f"model.path={folders / 'stock'}")
    assert "exit layer 4" in refused(*heads(folders / "stock", "exits.layers=[4]"))
    assert "its own exits" in refused(*heads(folders / "adaptive", "exits.layers=[1,3]"))
    assert "128 positions" in refused(*heads(folders / "stock", "data.max_tokens=200"))
    larger = f"model.tokenizer='{folders / 'larger'}'"
    assert "token 99, the model 97 rows" in refused(*heads(folders / "stock", larger))
    assert "another tokenizer" in refused(
        "recipe=distill", *heads(folders / "stock")[1:], "recipe.teacher=tiny"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "'mamba' is not supported" in refused(*heads(tmp_path))


def test_an_output_folder_with_checkpoints_is_only_for_resuming(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    cfg = compose("train", [*OFFLINE, f"output_dir={tmp_path}"])
    with pytest.raises(DeliberateError, match="resume=true"):
        check_config(cfg)
    cfg.resume = True
    check_config(cfg)
    (tmp_path / "file").write_text("")
    cfg.output_dir = str(tmp_path / "file")
    with pytest.raises(DeliberateError, match="is a file"):
        check_output(cfg)


def test_composing_leaves_hydra_as_unused_and_can_be_repeated():
    first = compose("train", ["seed=1"])
    assert not GlobalHydra.instance().is_initialized()
    assert compose("train", ["seed=1"]) == first
    assert compose("train", ["seed=2"]).seed == 2


def test_the_text_before_an_answer_may_be_empty_and_is_typed_with_new_lines():
    keys = ("close_tag", "answer")
    cfg = compose("bench_votes", ["answer=", "close_tag=\\n#### "], verbatim=keys)
    assert (cfg.answer, cfg.close_tag) == ("", "\n#### ")
    with pytest.raises(DeliberateError, match="model is empty"):
        compose("bench_votes", ["model="], verbatim=("model", *keys))

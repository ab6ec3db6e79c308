"""`deliberate train +experiment=smollm2_draft`: `deliberate fit` with settings that are kept."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from deliberate.train import app
from deliberate.train.draft import recipe
from deliberate.train.draft.fit_command import fit_config
from deliberate.utils.errors import DeliberateError


@pytest.fixture
def fitted(monkeypatch):
    """Settings that `fit` was called with."""
    calls = []

    class Done:
        folder = "here"

    def fit(cfg, *, say):
        calls.append(cfg)
        return Done

    monkeypatch.setattr(recipe, "fit", fit)
    return calls


def test_the_experiment_is_fit_with_its_settings(fitted, tmp_path, capsys):
    folder = tmp_path / "out"
    app.main(["+experiment=smollm2_draft", f"output_dir={folder}", "recipe.fit.draft.passes=2"])
    (cfg,) = fitted
    assert (cfg.model, cfg.out, cfg.draft.passes) == ("smollm2", str(folder), 2)
    assert cfg.text.questions.count("gsm8k") == 6
    plain = OmegaConf.to_container(fit_config(["smollm2", f"out={folder}"]))
    given = OmegaConf.to_container(cfg)
    assert given.keys() == plain.keys()
    assert all(given[name].keys() == plain[name].keys() for name in ("text", "exits", "draft"))
    assert "model: here" in capsys.readouterr().out


def test_a_dry_run_fits_nothing(fitted, tmp_path, capsys):
    app.main(["+experiment=smollm2_draft", f"output_dir={tmp_path}/out", "dry_run=true"])
    assert not fitted and not (tmp_path / "out").exists()
    assert "450000 answer tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.max_steps=3"], "trainer.max_steps=3: recipe=draft trains no weight"),
        (["resume=true"], "resume=true: recipe=draft"),
        (["-m", "recipe.fit.draft.passes=1,2"], "one run"),
    ],
)
def test_what_it_would_not_obey_is_refused(fitted, tmp_path, words, said):
    with pytest.raises(DeliberateError, match=said):
        app.main(["+experiment=smollm2_draft", f"output_dir={tmp_path}/out", *words])
    assert not fitted

"""`deliberate bench chains`: record chains with probes, replay every rule, certify the bands.

Half of the problems fit the bands' curves; on the other half all rules are replayed and compared
with cutting at a fixed length that makes as many tokens, and the certificate is tested. Chains may
be read from a file in place of being recorded, also of other systems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from deliberate.api import checkpoint
from deliberate.calibration.certificate import Testing
from deliberate.eval.benchmarks.chain_setup import (
    chain_setup,
    places_of,
    record_chains,
)
from deliberate.eval.benchmarks.chain_tables import RuleRow, rule_row, show_certificate, show_rules
from deliberate.eval.benchmarks.harness import Session, check_clock, table_console
from deliberate.eval.benchmarks.public import public_chains
from deliberate.eval.benchmarks.recording import CHAINS_FILE
from deliberate.eval.benchmarks.retime import retimed
from deliberate.eval.benchmarks.settings import bench_config, listed, mapped
from deliberate.eval.grading.equality import same_answer
from deliberate.reasoning.calibrated_bands import boundary_ids
from deliberate.reasoning.chain_calibration import ChainCalibration, fit_curves
from deliberate.reasoning.chain_certificates import (
    THRESHOLDS,
    Resampled,
    certify_chains,
    chain_losses,
    resample_certificates,
)
from deliberate.reasoning.chain_replay import matched_length, replay_rule
from deliberate.reasoning.chain_walks import LookPlaces, Walk, walk
from deliberate.reasoning.recorded_chains import ChainSet, RecordedChain
from deliberate.reasoning.registry import STOP_POLICIES, chain_policy
from deliberate.reasoning.stop_policy import settings_of
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.errors import DeliberateError

WIDTH = 110
_VERBATIM = ("model", "chains", "outputs", "out", "open_tag", "close_tag", "answer")


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench chains`` with overrides of `configs/bench_chains.yaml`.

    Raises:
        DeliberateError: settings that cannot work, or chains that cannot be read.
    """
    cfg = bench_config("bench_chains", arguments, verbatim=_VERBATIM, folder=True)
    all_at_least(
        cfg, {"places.chunk": 1, "samples": 1, "batch": 1, "timed": 0, "threads": 1, "resamples": 0}
    )
    check_clock(cfg)
    one_of("fidelity", cfg.fidelity, ("dense", "exact", "threshold"))
    if cfg.chains is not None and cfg.outputs is not None:
        raise DeliberateError(f"chains={cfg.chains} and outputs={cfg.outputs}: give one of them")
    if cfg.retime and cfg.chains is None:
        raise DeliberateError("retime=true measures recorded chains anew: give their file, chains=")
    _check_rules(cfg)
    _check_places(cfg)
    settings = mapped(cfg, "bands")
    limits = {name: settings.pop(name) for name in ("answer", "go_on")}
    places = LookPlaces(**settings)
    session = Session("chains", arguments, cfg.threads)
    chains, encode = _chains(cfg)
    if cfg.out is not None and (cfg.outputs is not None or cfg.retime):
        chains.save(Path(str(cfg.out)) / CHAINS_FILE)  # it took longest: kept whatever comes
    session.end()
    first, second = halves(chains)
    fitting, testing = (_walks(one.chains, places, encode) for one in (first, second))
    calibration = fit_curves(fitting, places)
    certified, resampled = None, None
    independent = len({chain.id for chain in second.chains}) == len(second.chains)
    known = all(chain.expected is not None for chain in second.chains)
    loss = cfg.loss if known else "changed"
    if independent:
        tested, certificate = certify_chains(
            calibration, second, testing, epsilon=cfg.epsilon, delta=cfg.delta, loss=loss
        )
        certified = tested
        if certificate is not None:
            calibration = dataclasses.replace(calibration, certificates=(certificate,))
        if cfg.resamples:
            resampled = resampled_certificates(cfg, calibration, testing, loss)
    rows = replay_all(cfg, second, calibration, limits, encode)
    console = table_console(WIDTH)
    show_rules(console, rows, second)
    if certified is not None:
        show_certificate(console, certified, resampled, loss)
    else:
        console.print("no certificate: several chains of one problem are not independent")
    console.print(session.line(str(cfg.clock)))
    if cfg.out is not None:
        _write(cfg, session, chains, calibration, rows, certified, resampled)


def _check_rules(cfg: DictConfig) -> None:
    """Raises DeliberateError for a rule that cannot be built, before chains are recorded."""
    for rule in listed(cfg, "rules"):
        if not isinstance(rule, Mapping) or not rule:
            raise DeliberateError(f"rules: {rule!r:.80} must be {{policy: settings}}")
        for name, given in rule.items():
            settings_of(STOP_POLICIES, name, given)


def _check_places(cfg: DictConfig) -> None:
    """Raises DeliberateError for a rule that would look where no probe is going to be recorded."""
    if cfg.chains is not None or not cfg.exact:
        return  # what was recorded is known only when it is read
    for rule in listed(cfg, "rules"):
        probe = rule.get("probe")
        chunk = probe.get("chunk") if isinstance(probe, Mapping) else None
        if isinstance(chunk, int) and chunk % cfg.places.chunk:
            raise DeliberateError(
                f"places.chunk={cfg.places.chunk} records no probe every {chunk} tokens, where the "
                f"rule {rule_name(rule)} looks: give a divisor of {chunk}, or exact=false"
            )


def _chains(cfg: DictConfig) -> tuple[ChainSet, Callable[[str], Sequence[int]]]:
    """Recorded chains, read or made, and ids of a text."""
    if cfg.outputs is not None:
        return public_chains(cfg)
    if cfg.chains is None:
        setup = chain_setup(cfg)
        folder = None if cfg.out is None else Path(str(cfg.out))
        places, samples = places_of(cfg), int(cfg.samples)
        return record_chains(setup, places, samples=samples, folder=folder), setup.encode
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    chains = ChainSet.load(Path(str(cfg.chains)).expanduser(), encode)
    if cfg.limit is not None:
        kept = set([*dict.fromkeys(one.id for one in chains.chains)][: cfg.limit])
        of_them = tuple(one for one in chains.chains if one.id in kept)
        chains = dataclasses.replace(chains, chains=of_them)
    return (retimed(cfg, chains) if cfg.retime else chains), encode


def halves(chains: ChainSet) -> tuple[ChainSet, ChainSet]:
    """Chains of every other problem, and the rest.

    Raises:
        DeliberateError: of one problem only.
    """
    order = list(dict.fromkeys(chain.id for chain in chains.chains))
    if len(order) < 2:
        raise DeliberateError("chains of 2 problems at least are needed, to fit and to test")
    odd = set(order[1::2])
    return (
        dataclasses.replace(chains, chains=tuple(c for c in chains.chains if c.id not in odd)),
        dataclasses.replace(chains, chains=tuple(c for c in chains.chains if c.id in odd)),
    )


def _walks(
    chains: Sequence[RecordedChain], places: LookPlaces, encode: Callable[[str], Sequence[int]]
) -> list[Walk]:
    endings = boundary_ids(places.boundaries, encode)
    return [walk(chain, places, endings, same_answer) for chain in chains]


def resampled_certificates(
    cfg: DictConfig, calibration: ChainCalibration, walks: Sequence[Walk], loss: str
) -> Resampled:
    """Certificates over testing sets drawn from the testing chains, as many each."""
    losses = chain_losses(calibration, walks, THRESHOLDS, loss)
    return resample_certificates(
        losses,
        len(walks),
        epsilon=cfg.epsilon,
        delta=cfg.delta,
        resamples=cfg.resamples,
        seed=cfg.seed,
    )


def replay_all(
    cfg: DictConfig,
    chains: ChainSet,
    calibration: ChainCalibration,
    limits: Mapping[str, float],
    encode: Callable[[str], Sequence[int]],
) -> list[RuleRow]:
    """Every rule on the same chains, each with the fixed length that makes as many tokens."""
    chosen: dict[str, Mapping[str, Any]] = {f"cut {n}": {"cut": {"tokens": n}} for n in cfg.cuts}
    chosen |= {rule_name(rule): rule for rule in listed(cfg, "rules")}
    chosen["bands"] = {"bands": {"calibration": calibration, **limits}}
    for one in calibration.certificates:
        certified = {"calibration": calibration, "answer": one.lambda_, "go_on": one.lambda_}
        chosen["bands, certified"] = {"bands": certified}
    run = partial(replay_rule, chains=chains.chains, same=same_answer, exact=cfg.exact)
    whole = run("whole chain", lambda: None)
    rows = [rule_row(whole, whole, None, chains.costs)]
    for name, settings in chosen.items():
        done = run(name, partial(chain_policy, settings, encode, same_answer))
        control = None
        if not name.startswith("cut"):
            mean = float(np.mean([one.tokens for one in done.replayed]))
            size = matched_length(chains.chains, mean)
            cut = {"cut": {"tokens": size}}
            # No probe is recorded at most lengths: the newest one before answers.
            control = replay_rule(
                f"cut {size}",
                partial(chain_policy, cut, encode),
                chains.chains,
                same_answer,
                exact=False,
            )
        rows.append(rule_row(done, whole, control, chains.costs))
    return rows


def rule_name(rule: Mapping[str, Mapping[str, Any] | None]) -> str:
    """``probe agree=3 chunk=64`` of ``{probe: {agree: 3, chunk: 64}}``."""
    return " + ".join(
        " ".join([name, *(f"{key}={value}" for key, value in (given or {}).items())])
        for name, given in rule.items()
    )


def _write(
    cfg: DictConfig,
    session: Session,
    chains: ChainSet,
    calibration: ChainCalibration,
    rows: Sequence[RuleRow],
    certified: Testing | None,
    resampled: Resampled | None,
) -> None:
    from deliberate.eval.benchmarks.chain_figures import chains_page

    out = Path(str(cfg.out))
    calibration.save(out)
    session.write(
        out / "figures.json",
        {
            "settings": OmegaConf.to_container(cfg),
            "rules": [dataclasses.asdict(row) for row in rows],
            "tests": None if certified is None else dataclasses.asdict(certified),
            "resampled": None if resampled is None else dataclasses.asdict(resampled),
        },
    )
    chains_page(out, chains, rows, calibration)

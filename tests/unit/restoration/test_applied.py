"""Whatever is applied to a model leaves it as it was, also when something fails meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import family

from lcc_lens.analysis.scan.scan import scan
from lcc_lens.core.errors import RequestError
from lcc_lens.data.datasets import encode, load_data
from lcc_lens.evaluation.baselines.lofit import SparseGains
from lcc_lens.models.hooked.hooks import kept_hooks, z_name
from lcc_lens.models.hooked.weights import is_changed
from lcc_lens.restoration.injections.ingredients import Ingredients
from lcc_lens.restoration.injections.methods import METHODS
from lcc_lens.restoration.injections.spec import MethodSpec
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.scans import check_scan

TOKENS = torch.arange(1, 25)[None]
GAINS = "sparse gains"
ALL = [*METHODS, "lcc+gain+low-rank+norms"]


@pytest.fixture(scope="module")
def given(pair, question_file: Path) -> Ingredients:
    """All that any method may need: a scan with the MLP's directions, the pair itself, and examples."""
    data = load_data(str(question_file))
    found = scan(pair, data, spectra=("z", "mlp"))
    heads = found.select("mse", share=0.5)
    return Ingredients(
        pair.pruned, found.components, heads, pair.output_projections, mlp=found.others["mlp"], pair=pair,
        sequences=encode(data, pair.tokenizer),
    )  # fmt: skip


def build(pair, given: Ingredients, kind: str):
    if kind == GAINS:
        injection = SparseGains(MethodSpec.parse("gain").build(given).changes(), l1=1e-3)
    else:
        injection = MethodSpec.parse(kind).build(given)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number in injection.parameters():
            if number.requires_grad or "mean-shift" in kind:
                number += 0.1 * torch.randn(number.shape, generator=generator)
    return injection


def state_of(model: Any) -> dict[str, Any]:
    """Everything that could be left behind: parameters, modules, hooks and instance attributes."""
    modules = dict(model.original_model.named_modules())
    return {
        "parameters": {name: id(number) for name, number in model.original_model.named_parameters()},
        "modules": {name: id(module) for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "hooks": {
            name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in modules.items()
        },
        "points": {name: len(point.fwd_hooks) + len(point.bwd_hooks) for name, point in model.hook_dict.items()},
    }


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [*ALL, GAINS])
def test_injections_leave_the_model_as_it_was(pair, given, kind: str, fails: bool) -> None:
    injection, before, state = build(pair, given, kind), logits_of(pair.pruned), state_of(pair.pruned)
    try:
        with injection.applied_to(pair.pruned) as model:
            assert float((logits_of(model) - before).abs().max()) > 1e-3
            assert state_of(model) != state
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert torch.equal(logits_of(pair.pruned), before)
    assert state_of(pair.pruned) == state


@pytest.mark.parametrize("kind", [kind for kind in ALL if not MethodSpec.parse(kind).compare_only])
def test_restorations_leave_the_model_as_it_was(pair, given, kind: str) -> None:
    injection, before, state = build(pair, given, kind), logits_of(pair.pruned), state_of(pair.pruned)
    restoration = Restoration.of(injection, RestorationRecord("d", "p", "", "", kind, "none", 0, 0))
    with injection.applied_to(pair.pruned) as model:
        expected = logits_of(model)
    with pytest.raises(KeyError), restoration.applied_to(pair.pruned) as model:
        assert torch.allclose(logits_of(model), expected, atol=1e-5)
        raise KeyError
    assert float((expected - before).abs().max()) > 1e-3
    assert torch.equal(logits_of(pair.pruned), before)
    assert state_of(pair.pruned) == state


def test_an_injection_that_fails_while_it_computes_leaves_the_model_as_it_was(pair, given, monkeypatch) -> None:
    injection, before, state = build(pair, given, "lcc+low-rank"), logits_of(pair.pruned), state_of(pair.pruned)
    change = next(iter(injection.parts[1].changes().values()))

    def fail(weight):
        raise ValueError("no")

    monkeypatch.setattr(change, "forward", fail)
    with pytest.raises(ValueError, match="no"), injection.applied_to(pair.pruned) as model:
        model(TOKENS)
    assert torch.equal(logits_of(pair.pruned), before)
    assert state_of(pair.pruned) == state


@pytest.mark.parametrize("kind", ["lcc", "low-rank"])
def test_a_scan_of_a_changed_model_is_not_taken_for_the_checkpoints(
    pair, given, question_file: Path, tmp_path: Path, kind: str
) -> None:
    """Neither a scan of the pruned model goes on from it, nor is it kept or restored from."""
    data = load_data(str(question_file), n=4)
    with build(pair, given, kind).applied_to(pair.pruned):
        found = scan(pair, data, selectors=(), display=0)
        with pytest.raises(RequestError, match="got one with hooks or changed weights; export it and scan that"):
            scan(pair, data, run=tmp_path / "run")
    with pytest.raises(RequestError, match="as their checkpoints are for a scan in a run, got one with hooks"):
        found.save(tmp_path / "run")
    with pytest.raises(RequestError, match="got one with hooks or changed weights; scan this pair without them"):
        check_scan(found, pair)
    assert not (tmp_path / "run").exists()
    check_scan(scan(pair, data, selectors=(), display=0, run=tmp_path / "run"), pair)


def test_a_models_own_hooks_do_not_change_it(tmp_path: Path) -> None:
    """TransformerLens wires OPT's MLPs by hooks that stay."""
    model = family("opt", tmp_path)
    assert any(point.fwd_hooks for point in model.hook_dict.values())
    assert not is_changed(model)
    with kept_hooks(model, [(z_name(0), lambda z, hook: z + 1)]):
        assert is_changed(model)
    assert not is_changed(model)

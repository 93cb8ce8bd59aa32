"""MoS's three phases: what moves in each, what the optimizer holds, how codebooks and experts start, what is kept."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_files import TINY_MAX_LEN, small_model, tiny_dataset, tiny_loader
from torch import Tensor

from model_zoo import three_phase
from model_zoo.checkpoint import read_weights
from model_zoo.compat import seed_everything
from model_zoo.errors import ConfigError

State = dict[str, Tensor]
EXACT = "donot_use_mm_for_euclid_dist"
STOCHASTIC: dict[str, Any] = {"net_dropout": 0.2, "attention_dropout": 0.2}


def state(model: Any) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def group_of(name: str) -> str:
    """The part of a MoS_TWIN that a parameter or buffer belongs to."""
    if ".h." in name:
        return "h"
    if ".codebook." in name:
        return "codebook"
    if "_experts." in name:
        return "experts"
    if name.endswith("_extra_state"):
        return "fusion"
    if "running_" in name or name.endswith("num_batches_tracked"):
        return "batch norm statistics"
    return {"embedding_layer": "embedding", "head": "head"}.get(name.split(".")[0], "global expert")


def moved(end: State, start: State) -> dict[str, set[bool]]:
    """Per part: whether its tensors differ at all, bit for bit."""
    found: dict[str, set[bool]] = {}
    for name, value in start.items():
        if ".codebook." not in name or name.endswith(".codes"):  # counters beside the codes may rest
            found.setdefault(group_of(name), set()).add(not torch.equal(end[name], value))
    return found


@dataclass
class Entered:
    """What was so right after a phase was entered."""

    state: State
    trainable: set[str]
    optimised: set[str]
    alphas: tuple[float, float]
    update_codebooks: bool
    gradients_left: bool
    optimizer: Any = field(repr=False)


def traced_fit(model: Any, epochs: int = 1, batches: Any = None, seed: int = 0) -> dict[str, Entered]:
    """Fit on the tiny data set; returns what each phase started from."""
    entered: dict[str, Entered] = {}
    enter = model.enter

    def watch(phase: Any) -> None:
        enter(phase)
        names = {id(p): name for name, p in model.named_parameters()}
        held = [names[id(p)] for group in model.optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        entered[phase.name] = Entered(
            state(model),
            {name for name, p in model.named_parameters() if p.requires_grad},
            set(held),
            (model.mos.alpha_item, model.mos.alpha_window),
            model.mos.update_codebooks,
            any(p.grad is not None for p in model.parameters()),
            model.optimizer,
        )

    model.enter = watch
    seed_everything(seed)
    model.fit(batches or tiny_loader(shuffle=True), epochs=epochs, validation_data=tiny_loader("valid"))
    return entered


def loaded(path: str) -> State:
    return read_weights(path).state


# ---- the freeze table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [1, 2])
def test_what_each_phase_moves(tmp_path: Path, topk: int) -> None:
    model = small_model("MoS_TWIN", tmp_path, topk_item=topk, topk_window=topk, **STOCHASTIC)
    entered = traced_fit(model)
    backbone = ("embedding", "global expert", "head", "batch norm statistics")
    for phase, still, moving in (
        ("phase1", ("experts", "h", "codebook"), backbone),
        ("phase2", backbone, ("experts", "codebook")),
        ("phase3", (), (*backbone, "experts", "codebook")),
    ):
        found = moved(loaded(model.phase_checkpoint(phase)), entered[phase].state)
        assert {part: found[part] for part in still} == {part: {False} for part in still}, phase
        assert {part: found[part] for part in moving} == {part: {True} for part in moving}, phase
        # the literal eq. 2: with one kept expert its gate is 1 whatever h is, so h has no gradient and never moves
        assert found["h"] == {phase != "phase1" and topk == 2}, phase


def test_with_one_kept_expert_h_has_no_gradient_at_all() -> None:
    for topk, gated in ((1, False), (2, True)):
        model = small_model("MoS_TWIN", topk_item=topk, topk_window=topk)
        model.enter(model.phases(1)[-1])
        batch = tiny_loader().batch(np.arange(30))
        model.compute_loss(model(batch), model.get_labels(batch)).backward()
        for router in (model.mos.item_router, model.mos.window_router):
            found = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in router.h.parameters()]
            assert found == [gated] * len(found)


def test_the_optimizer_of_a_phase_is_new_and_holds_exactly_what_trains(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, accumulation_steps=3, longctr_compat=False)
    entered = traced_fit(model)
    names = {name for name, _ in model.named_parameters()}
    experts = {name for name in names if group_of(name) in ("experts", "h")}
    assert entered["phase1"].trainable == names - experts
    assert entered["phase2"].trainable == experts
    assert entered["phase3"].trainable == names
    for phase in entered.values():
        assert phase.optimised == phase.trainable
        assert not phase.gradients_left
    assert len({id(phase.optimizer) for phase in entered.values()}) == 3
    assert not [name for name in names if "codebook" in name]


def test_learning_rates_and_epochs_per_phase(tmp_path: Path) -> None:
    model = small_model(
        "MoS_TWIN", tmp_path, phase1_epochs=2, phase2_epochs=1, phase3_epochs=3, phase_lrs=[1e-2, 3e-3, 1e-3],
        reduce_lr_on_plateau=False, early_stop_patience=9,
    )  # fmt: skip
    traced_fit(model, epochs=50)
    assert [(r["phase"], r["epoch"], r["learning_rate"]) for r in model.history] == [
        ("phase1", 1, 1e-2), ("phase1", 2, 1e-2), ("phase2", 1, 3e-3),
        ("phase3", 1, 1e-3), ("phase3", 2, 1e-3), ("phase3", 3, 1e-3),
    ]  # fmt: skip


def test_epochs_bounds_phases_1_and_3_and_phase_2_has_one_by_default(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, early_stop_patience=9)
    traced_fit(model, epochs=2)
    assert [r["phase"] for r in model.history] == ["phase1"] * 2 + ["phase2"] + ["phase3"] * 2


def test_each_phase_stops_early_on_its_own(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, early_stop_patience=1)
    scores = iter([0.9, 0.8, 0.5, 0.6, 0.7, 0.65])  # phase 1: 2 epochs; phase 2: 1; phase 3: a fresh best, 3 epochs
    model.evaluate = lambda batches: {"AUC": next(scores)}
    traced_fit(model, epochs=9)
    assert [(r["phase"], r["best"]) for r in model.history] == [
        ("phase1", True), ("phase1", False), ("phase2", True),
        ("phase3", True), ("phase3", True), ("phase3", False),
    ]  # fmt: skip


def test_early_stopping_patience_per_phase(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, phase_patience=[1, 2, 3], phase2_epochs=9)
    scores = iter([0.9, 0.8, 0.9, 0.8, 0.8, 0.9, 0.8, 0.8, 0.8])  # 2, 3 and 4 evaluations
    model.evaluate = lambda batches: {"AUC": next(scores)}
    traced_fit(model, epochs=9)
    assert [r["phase"] for r in model.history] == ["phase1"] * 2 + ["phase2"] * 3 + ["phase3"] * 4


def test_three_patiences_or_none() -> None:
    for patience in ([1, 2], [1, 2, 0]):
        with pytest.raises(ValueError, match="phase_patience needs three numbers of at least 1, one per phase"):
            small_model("MoS_TWIN", phase_patience=patience)


def test_three_learning_rates_or_none() -> None:
    with pytest.raises(ValueError, match="phase_lrs needs three learning rates, one per phase"):
        small_model("MoS_TWIN", phase_lrs=[1e-3, 1e-3])
    with pytest.raises(ValueError, match="save_best_only must be True"):
        small_model("MoS_TWIN", save_best_only=False)


# ---- phase 1 is the plain backbone -----------------------------------------------------------------------------------


def as_twin(mos_state: State) -> State:
    """The backbone's part of a MoS_TWIN's state under TWIN's names."""
    return {
        name.replace("block.global_expert.", "block."): value
        for name, value in mos_state.items()
        if group_of(name) not in ("experts", "h", "codebook", "fusion")
    }


def fit_twin(folder: Path, epochs: int = 3, **overrides: Any) -> Any:
    twin = small_model("TWIN", folder, seed=4, **STOCHASTIC, **overrides)
    seed_everything(4)
    twin.fit(tiny_loader(shuffle=True), epochs=epochs, validation_data=tiny_loader("valid"))
    return twin


def validations(model: Any, phase: str) -> list[dict[str, float]]:
    return [record["valid"] for record in model.history if record["phase"] == phase]


def test_phase_1_is_bit_for_bit_the_plain_backbone_of_the_same_seed(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"embedding_regularizer": 1e-3, "net_regularizer": 1e-4}
    twin = fit_twin(tmp_path, **extra)
    mos = small_model("MoS_TWIN", tmp_path, seed=4, phase3_epochs=1, **STOCHASTIC, **extra)
    traced_fit(mos, epochs=3, seed=4)
    found = as_twin(loaded(mos.phase_checkpoint("phase1")))
    assert found.keys() == twin.state_dict().keys()
    for name, value in twin.state_dict().items():
        assert torch.equal(found[name], value), name
    assert validations(mos, "phase1") == validations(twin, "train") and len(validations(twin, "train")) == 3
    twins, ours = ([r["train_loss"] for r in m.history] for m in (twin, mos))
    assert ours[:3] == pytest.approx(twins, rel=1e-9)


def test_without_fusion_weights_only_phase_1_runs_and_the_model_is_the_backbone(tmp_path: Path) -> None:
    twin = fit_twin(tmp_path)
    mos = small_model("MoS_TWIN", tmp_path, seed=4, alpha_item=0.0, alpha_window=0.0, **STOCHASTIC)
    assert mos.expert_modules() == [] and [phase.name for phase in mos.phases(3)] == ["phase1"]
    entered = traced_fit(mos, epochs=3, seed=4)
    assert list(entered) == ["phase1"]
    assert validations(mos, "phase1") == validations(twin, "train")
    found = as_twin(loaded(mos.checkpoint))
    assert all(torch.equal(found[name], value) for name, value in twin.state_dict().items())
    assert np.array_equal(mos.predict(tiny_loader()), twin.predict(tiny_loader()))
    assert mos.codebook_usage(tiny_loader()) == {}


# ---- fusion weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        ({}, [(0.0, 0.0), (0.5, 0.5), (0.25, 0.25)]),
        ({"alpha_item": 0.3, "alpha_window": 0.1}, [(0.0, 0.0), (0.5, 0.5), (0.3, 0.1)]),
        ({"n_window_experts": 0}, [(0.0, 0.0), (1.0, 0.0), (0.25, 0.0)]),
        ({"n_item_experts": 0}, [(0.0, 0.0), (0.0, 1.0), (0.0, 0.25)]),
        ({"alpha_window": 0.0}, [(0.0, 0.0), (1.0, 0.0), (0.25, 0.0)]),
    ],
)
def test_fusion_weights_of_each_phase(tmp_path: Path, overrides: dict[str, Any], wanted: list[Any]) -> None:
    model = small_model("MoS_TWIN", tmp_path, **overrides)
    entered = traced_fit(model)
    assert [phase.alphas for phase in entered.values()] == wanted
    assert [phase.update_codebooks for phase in entered.values()] == [False, True, True]
    assert (model.mos.alpha_item, model.mos.alpha_window) == wanted[-1]
    assert not model.mos.update_codebooks


def test_loading_a_phases_checkpoint_restores_its_fusion_weights_and_its_scores(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path)
    traced_fit(model, epochs=2)
    fresh = small_model("MoS_TWIN", tmp_path / "elsewhere", seed=9)
    for phase, alphas in (("phase1", (0.0, 0.0)), ("phase2", (0.5, 0.5)), ("phase3", (0.25, 0.25))):
        best = [r for r in model.history if r["phase"] == phase and r["best"]][-1]
        for other in (model, fresh):
            other.load_weights(model.phase_checkpoint(phase))
            assert (other.mos.alpha_item, other.mos.alpha_window) == alphas
            assert other.evaluate(tiny_loader("valid")) == best["valid"]


# ---- codebooks -------------------------------------------------------------------------------------------------------


def codebooks(model: Any) -> list[Tensor]:
    return [router.codebook.codes.detach().clone() for router in (model.mos.item_router, model.mos.window_router)]


@pytest.mark.parametrize("phase, trains", [(0, False), (1, True), (2, True)])
def test_codebooks_move_only_in_training_forwards_of_phases_2_and_3(phase: int, trains: bool) -> None:
    model = small_model("MoS_TWIN")
    model.enter(model.phases(1)[phase])
    before, batch = codebooks(model), tiny_loader().batch(np.arange(30))
    model.eval()(batch)
    assert all(torch.equal(a, b) for a, b in zip(codebooks(model), before, strict=True))
    model.train()(batch)
    assert [torch.equal(a, b) for a, b in zip(codebooks(model), before, strict=True)] == [not trains] * 2


def test_codebooks_rest_in_training_forwards_outside_the_phases() -> None:
    model = small_model("MoS_TWIN")
    model.mos.set_fusion(0.25, 0.25)
    before = codebooks(model)
    model.train()(tiny_loader().batch(np.arange(30)))
    assert all(torch.equal(a, b) for a, b in zip(codebooks(model), before, strict=True))


def test_a_learned_codebook_is_trained_by_gradient_in_phases_2_and_3_alone(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, codebook="learned")
    entered = traced_fit(model)
    for phase, still in (("phase1", True), ("phase2", False), ("phase3", False)):
        name = "block.item_router.codebook.codes"
        assert torch.equal(loaded(model.phase_checkpoint(phase))[name], entered[phase].state[name]) == still
        assert (name in entered[phase].optimised) != still


def kmeans_calls(monkeypatch: pytest.MonkeyPatch, model: Any, batches: Any = None) -> list[dict[str, Tensor]]:
    """Start the experts; returns points and weights of each k-means (item, then window)."""
    calls: list[dict[str, Tensor]] = []
    real = three_phase.cosine_kmeans

    def watch(points: Tensor, weight: Tensor, themes: int, seed: int) -> tuple[Tensor, Tensor]:
        centroids, sizes = real(points, weight, themes, seed)
        calls.append({"points": points, "weight": weight, "centroids": centroids, "sizes": sizes})
        return centroids, sizes

    monkeypatch.setattr(three_phase, "cosine_kmeans", watch)
    model.start_experts(batches or tiny_loader(shuffle=True))
    return calls


def history_counts() -> Tensor:
    """How often each item stands in the training rows' histories."""
    return torch.bincount(tiny_loader().batch(np.arange(30)).history.flatten().long(), minlength=60)


def item_hidden(model: Any, items: Tensor) -> Tensor:
    vectors = model.embedding_layer(model.item_features.rows(items), flatten_emb=True)
    return model.mos.item_router.encode(vectors).detach()


@pytest.mark.parametrize("kmeans_data", ["occurrences", "unique_items"])
def test_kmeans_sees_h_of_every_history_item_once_with_its_count(
    monkeypatch: pytest.MonkeyPatch, kmeans_data: str
) -> None:
    model = small_model("MoS_TWIN", kmeans_data=kmeans_data)
    call = kmeans_calls(monkeypatch, model)[0]
    counts = history_counts()
    counts[0] = 0  # padding
    items = counts.nonzero().squeeze(1)
    wanted = item_hidden(model, items)
    # h of one item may differ in the last bit between its occurrences, so points are matched by distance
    distance, nearest = torch.cdist(call["points"], wanted, compute_mode=EXACT).min(1)
    assert float(distance.max()) < 1e-5
    assert set(nearest.tolist()) == set(range(len(items)))
    if kmeans_data == "occurrences":
        found = torch.zeros(len(items), dtype=torch.long).index_add_(0, nearest, call["weight"].long())
        assert torch.equal(found, counts[items])
    else:
        assert torch.equal(call["weight"], torch.ones_like(call["weight"]))
        assert len(call["points"]) == len(items)
    assert torch.equal(model.mos.item_router.codebook.codes, call["centroids"])


def test_kmeans_of_the_window_codebook_sees_h_of_every_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("MoS_TWIN")
    call = kmeans_calls(monkeypatch, model)[1]
    _, _, sequence = model._read(tiny_loader().batch(np.arange(30)))
    windows = model.mos.window_tokens(sequence)
    wanted = model.mos.window_router.encode(windows.vectors[windows.mask]).detach()
    assert int(call["weight"].sum()) == len(wanted)
    nearest = torch.cdist(wanted, call["points"], compute_mode=EXACT).min(1).values
    assert float(nearest.max()) < 1e-5  # window means in single precision
    assert torch.equal(model.mos.window_router.codebook.codes, call["centroids"])


def test_the_token_sample_is_bounded_spread_over_batches_and_leaves_the_model_in_its_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model("MoS_TWIN", kmeans_tokens=80).train()
    total = sum(int(call["weight"].sum()) for call in kmeans_calls(monkeypatch, model)[:1])
    assert total == 80 and model.training


def test_the_kmeans_start_is_a_function_of_its_seed_and_draws_nothing_from_the_global_stream() -> None:
    starts = []
    for seed in (3, 3, 4):
        model = small_model("MoS_TWIN", kmeans_tokens=60, kmeans_seed=seed)
        before = torch.get_rng_state()
        model.start_experts(tiny_loader(shuffle=True))
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(codebooks(model))
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not torch.equal(starts[0][0], starts[2][0])


def test_the_kmeans_start_raises_the_cosine_of_tokens_to_their_theme() -> None:
    model = small_model("MoS_TWIN")
    counts = history_counts()
    counts[0] = 0
    fit = []
    for _ in range(2):
        best = model.mos.item_router.codebook.cosine(item_hidden(model, torch.arange(60))).max(1).values
        fit.append(float((best * counts).sum() / counts.sum()))
        model.start_experts(tiny_loader())
    assert fit[1] > fit[0] + 0.02


def test_kmeans_in_the_input_space_takes_h_of_the_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("MoS_TWIN", kmeans_space="input")
    call = kmeans_calls(monkeypatch, model)[0]
    assert call["points"].shape[1] == model.item_dim
    with torch.no_grad():
        wanted = model.mos.item_router.encode(call["centroids"])
    torch.testing.assert_close(model.mos.item_router.codebook.codes, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("overrides", [{"short_history": "skip"}, {"window_align": "left"}])
def test_a_router_that_no_training_row_gives_a_token_keeps_its_random_start(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    model = small_model("MoS_TWIN", tmp_path, window_size=TINY_MAX_LEN + 1, **overrides)
    entered = traced_fit(model)
    window, item = "block.window_router.codebook.codes", "block.item_router.codebook.codes"
    assert torch.equal(entered["phase2"].state[window], entered["phase1"].state[window])
    assert not torch.equal(entered["phase2"].state[item], entered["phase1"].state[item])


def test_kmeans_tokens_0_leaves_the_codebooks_at_their_random_start(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, kmeans_tokens=0)
    entered = traced_fit(model)
    for name in ("block.item_router.codebook.codes", "block.window_router.codebook.codes"):
        assert torch.equal(entered["phase1"].state[name], entered["phase2"].state[name])
        assert not torch.equal(entered["phase2"].state[name], loaded(model.phase_checkpoint("phase2"))[name])


def test_experts_start_random_or_as_copies_of_the_trained_global_expert(tmp_path: Path) -> None:
    for init in ("random", "copy_global"):
        model = small_model("MoS_TWIN", tmp_path / init, expert_init=init)
        start = traced_fit(model)["phase2"].state
        trained = loaded(model.phase_checkpoint("phase1"))
        for branch, count in (("item", 3), ("window", 2)):
            for number in range(count):
                for name in ("short_attention.W_q.weight", "long_attention.W_o.weight"):
                    expert = start[f"block.{branch}_experts.experts.{number}.{name}"]
                    assert torch.equal(expert, trained[f"block.global_expert.{name}"]) == (init == "copy_global")
        first = start["block.item_experts.experts.0.long_attention.W_v.weight"]
        assert torch.equal(first, start["block.item_experts.experts.1.long_attention.W_v.weight"]) == (init != "random")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_each_phase_leaves_its_checkpoint_and_the_final_one_is_phase_3s_best(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, early_stop_patience=9)
    ends: list[tuple[str, State]] = []
    scores = iter([0.9, 0.8, 0.5, 0.7, 0.75, 0.6])

    def evaluate(batches: Any) -> dict[str, float]:
        ends.append((model.phase_name, state(model)))
        return {"AUC": next(scores)}

    model.evaluate = evaluate
    model.phase_epochs = (2, 1, 3)
    traced_fit(model, epochs=9)
    names = ["MoS_TWIN.model", *(f"MoS_TWIN.phase{number}.model" for number in (1, 2, 3))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert model.checkpoint == str(tmp_path / "MoS_TWIN.model") == model.final_checkpoint
    for phase, best in (("phase1", 0), ("phase2", 2), ("phase3", 4)):
        kept = loaded(model.phase_checkpoint(phase))
        assert ends[best][0] == phase
        assert all(torch.equal(kept[name], value) for name, value in ends[best][1].items()), phase
    final = loaded(model.checkpoint)
    for found in (final, state(model)):
        assert all(torch.equal(found[name], value) for name, value in ends[4][1].items())


def test_phases_of_no_epochs_are_left_out(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, phase1_epochs=0, phase3_epochs=0)
    entered = traced_fit(model)
    assert list(entered) == ["phase2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MoS_TWIN.model", "MoS_TWIN.phase2.model"]


def interrupt_after(model: Any, steps: int) -> None:
    step, taken = model.train_step, iter(range(steps))

    def until(batch: Any) -> Tensor:
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return step(batch)

    model.train_step = until


@pytest.mark.parametrize("steps", [2, 6, 10])
def test_an_interrupted_training_leaves_whole_checkpoints_and_does_not_touch_an_earlier_final_one(
    tmp_path: Path, steps: int
) -> None:
    first = small_model("MoS_TWIN", tmp_path)
    traced_fit(first)
    final = Path(first.checkpoint).read_bytes()
    second = small_model("MoS_TWIN", tmp_path, seed=5)
    interrupt_after(second, steps)  # 4 batches a phase
    with pytest.raises(KeyboardInterrupt):
        traced_fit(second)
    assert Path(first.final_checkpoint).read_bytes() == final
    assert not list(tmp_path.glob("*.partial"))
    fresh = small_model("MoS_TWIN", tmp_path / "fresh")
    for path in tmp_path.glob("*.model"):
        fresh.load_weights(str(path))
        assert np.isfinite(fresh.predict(tiny_loader())).all()


def test_a_write_cut_short_in_a_later_phase_keeps_that_phases_earlier_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("MoS_TWIN", tmp_path, early_stop_patience=9)
    real: Callable[..., None] = torch.save
    scores = iter([0.5, 0.5, 0.6, 0.7])
    model.evaluate = lambda batches: {"AUC": next(scores)}
    model.phase_epochs = (1, 1, 2)
    kept: dict[str, bytes] = {}

    def save(content: Any, file: Any) -> None:
        if "phase3" in file.path and kept:
            file.write(b"half")
            raise OSError("disk full")
        real(content, file)
        if "phase3" in file.path:
            file.flush()
            kept["phase3"] = Path(file.path).read_bytes()

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk full"):
        traced_fit(model)
    assert Path(model.phase_checkpoint("phase3")).read_bytes() == kept["phase3"]
    assert not list(tmp_path.glob("*.partial"))


# ---- frozen tables, block_scope, usage, options ----------------------------------------------------------------------


def test_frozen_pretrained_vectors_stay_frozen_in_phase_3(tmp_path: Path) -> None:
    data = tiny_dataset()
    feature_map = type(data.feature_map)("tiny", "")
    feature_map.__dict__.update(data.feature_map.__dict__)
    feature_map.features = {name: dict(spec) for name, spec in data.feature_map.features.items()}
    feature_map.features["item_id"] |= {"pretrained_emb": "v.npz", "pretrain_usage": "sum", "freeze_emb": True}
    vectors = torch.randn(60, 8)
    model = small_model(
        "MoS_TWIN", tmp_path, dataset=replace(data, feature_map=feature_map),
        pretrained={"item_id": (vectors, torch.ones(60, dtype=torch.bool))},
    )  # fmt: skip
    entered = traced_fit(model)
    name = "embedding_layer.embedding_layer.embedding_layers.item_id.pretrain_embedding.weight"
    beside = name.replace("pretrain_embedding", "id_embedding")
    assert all(name not in phase.optimised for phase in entered.values())
    end = loaded(model.checkpoint)
    assert torch.equal(end[name], entered["phase1"].state[name])
    assert beside in entered["phase3"].optimised and not torch.equal(end[beside], entered["phase3"].state[beside])


def test_block_scope_long_puts_experts_over_the_long_branch_alone_and_trains(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, block_scope="long", commitment_weight=0.1, align_weight=0.1)
    entered = traced_fit(model)
    assert model.mos is model.block.long_attention
    dims = {name.split(".")[-2] for name, _ in model.mos.item_experts.named_parameters()}
    assert dims == {"W_q", "W_k", "W_v", "W_o"}
    for phase, short_moves in (("phase1", True), ("phase2", False), ("phase3", True)):
        end, start = loaded(model.phase_checkpoint(phase)), entered[phase].state
        for name, value in start.items():
            if name.startswith("block.short_attention."):
                assert torch.equal(end[name], value) != short_moves, (phase, name)
    expert = "block.long_attention.item_experts.experts.0.W_v.weight"
    assert not torch.equal(loaded(model.checkpoint)[expert], entered["phase2"].state[expert])
    batch = tiny_loader().batch(np.arange(8))
    assert len(model.train()(batch)["losses"]) == 4  # commitment and alignment of both branches


def test_block_scope_long_without_experts_is_the_backbone_and_its_phase_1_too(tmp_path: Path) -> None:
    twin = fit_twin(tmp_path)
    mos = small_model("MoS_TWIN", tmp_path, seed=4, block_scope="long", phase2_epochs=0, phase3_epochs=0, **STOCHASTIC)
    traced_fit(mos, epochs=3, seed=4)
    assert validations(mos, "phase1") == validations(twin, "train")


@pytest.mark.parametrize(
    "overrides",
    [
        {"router_input": "item_target"},
        {"router_linear": True, "router_bias": False},
        {"kmeans_space": "input", "kmeans_data": "unique_items"},
        {"shared_router": True},
        {"gate_norm": "softmax_then_mask", "topk_item": 1},
        {"gate_source": "target"},
        {"ema_mode": "count", "revive_dead": 2},
        {"ema_assign": "top1", "ema_normalize": True},
        {"window_align": "left"},
        {"short_history": "skip", "empty_history": "zeros", "window_divide_by": "size"},
        {"commitment_weight": 0.1, "align_weight": 0.1, "router_temperature": 0.2},
        {"alpha_item": 0.5, "alpha_window": 0.5},
        {"n_item_experts": 1, "topk_item": 1},
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_every_option_trains_through_all_phases(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = small_model("MoS_TWIN", tmp_path, **overrides)
    entered = traced_fit(model)
    end = loaded(model.checkpoint)
    assert list(entered) == ["phase1", "phase2", "phase3"]
    assert all(torch.isfinite(value).all() for value in end.values())
    for branch in ("item_experts", "window_experts"):
        found = [n for n, v in end.items() if branch in n and not torch.equal(v, entered["phase2"].state[n])]
        assert found, branch
    assert np.isfinite(model.predict(tiny_loader())).all()


def test_codebook_usage_agrees_with_a_plain_count(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path)
    traced_fit(model)
    report = model.codebook_usage(tiny_loader("valid"))
    assert set(report) == {"item", "window"}
    batch = tiny_loader().batch(np.arange(30))
    for name, router in (("item", model.mos.item_router), ("window", model.mos.window_router)):
        tokens = model.router_tokens(batch)[name]
        themes = router.codebook.num_themes
        share, gating, margins, routed = np.zeros(themes), np.zeros(themes), [], []
        members: list[list[Tensor]] = [[] for _ in range(themes)]
        for row in range(30):
            vectors = tokens.vectors[row][tokens.mask[row]]
            if len(vectors) == 0:
                continue
            hidden = router.encode(vectors).detach()
            score = F.cosine_similarity(hidden.unsqueeze(1), router.codebook.codes.unsqueeze(0), dim=-1)
            best = score.topk(2).indices
            for token, (first, second) in enumerate(best.tolist()):
                share[first] += 1
                margins.append(float(score[token, first] - score[token, second]))
                for theme in (first, second):
                    members[theme].append(hidden[token])
            newest = int(best[-1, 0])
            gating[newest] += 1
            routed.append(float((best == newest).any(1).float().mean()))
        share /= share.sum()
        assert report[name]["share"] == pytest.approx(share, abs=1e-6)
        assert report[name]["gating_share"] == pytest.approx(gating / gating.sum(), abs=1e-6)
        assert report[name]["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
        assert report[name]["routed"] == pytest.approx(np.mean(routed), abs=1e-5)
        entropy = -sum(p * np.log(p) for p in share if p > 0) / np.log(themes)
        assert report[name]["entropy"] == pytest.approx(entropy, abs=1e-5)
        for theme in range(themes):
            if members[theme]:
                mean = torch.stack(members[theme]).mean(0)
                drift = F.cosine_similarity(mean, router.codebook.codes[theme], dim=0)
                assert report[name]["drift"][theme] == pytest.approx(float(drift), abs=1e-4)


def test_codebook_usage_reads_no_more_batches_than_asked() -> None:
    model = small_model("MoS_TWIN")
    first = model.codebook_usage([tiny_loader().batch(np.arange(8))])
    assert model.codebook_usage(tiny_loader(batch_size=8), max_batches=1) == first
    assert model.codebook_usage(tiny_loader(batch_size=8)) != first


def test_a_checkpoint_of_the_plain_backbone_is_refused(tmp_path: Path) -> None:
    small_model("TWIN").save_weights(str(tmp_path / "twin.model"))
    with pytest.raises(ConfigError, match="does not fit MoS_TWIN"):
        small_model("MoS_TWIN").load_weights(str(tmp_path / "twin.model"))


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_one_train_step_and_an_evaluation_on_cuda_equal_the_cpus(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    ends, scores, losses = [], [], []
    for gpu in (-1, 0):
        # plain gradient descent: Adam's first step is the sign of the gradient, even where that is rounding noise
        model = small_model("MoS_TWIN", tmp_path, gpu=gpu, optimizer="SGD", learning_rate=0.1)
        if gpu >= 0:
            torch.cuda.reset_peak_memory_stats()
        model.enter(model.phases(1)[-1])
        model._batch_index, model._max_gradient_norm = 0, 10.0
        losses.append(float(model.train().train_step(tiny_loader().batch(np.arange(30)))))
        ends.append({name: value.cpu() for name, value in model.state_dict().items()})
        scores.append(torch.from_numpy(model.predict(tiny_loader("valid"))))
    peak = torch.cuda.max_memory_allocated()
    record_property("peak_cuda_memory_bytes", peak)
    print(f"peak CUDA memory of one MoS_TWIN step: {peak / 2**20:.1f} MiB")
    assert peak > 0
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-4)  # other sum orders, and TF32 is off by default
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_the_three_phases_run_on_cuda(tmp_path: Path) -> None:
    model = small_model("MoS_TWIN", tmp_path, gpu=0)
    traced_fit(model)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    on_gpu = model.predict(tiny_loader("valid"))
    cpu = small_model("MoS_TWIN", tmp_path)
    cpu.load_weights(model.checkpoint)
    np.testing.assert_allclose(on_gpu, cpu.predict(tiny_loader("valid")), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"dnn_activations": "Dice"}, {"align_weight": 0.1}, {"short_history": "skip"}])
def test_phase_2_moves_no_statistics_of_the_backbone_not_even_dices(tmp_path: Path, options: dict[str, Any]) -> None:
    model = small_model("MoS_DIN", tmp_path, **options)
    batch = tiny_loader().batch(np.arange(30))
    model._max_gradient_norm, model._batch_index = 10.0, 0
    moved = {}
    for phase in model.phases(1)[1:]:
        model.enter(phase)
        model.train()
        beside = {id(b) for module in model.expert_modules() for b in module.buffers()}
        before = {n: b.clone() for n, b in model.named_buffers() if id(b) not in beside}
        model.train_step(batch)
        moved[phase.name] = [n for n, b in model.named_buffers() if n in before and not torch.equal(b, before[n])]
    assert moved["phase2"] == [] and moved["phase3"] != []

"""``precision: bfloat16`` and ``compile: True``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import small_model, tiny_loader
from torch import Tensor

from model_zoo.compat import MLP_Block, seed_everything
from model_zoo.errors import ConfigError
from model_zoo.layers import compiled
from model_zoo.layers.routers import Routing

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
MODELS = ["TWIN", "SDIM", "TransAct", "Mamba4Rec", "SIM", "FinalMLP", "MoS_TWIN", "MoS_Mamba4Rec", "GShard_TWIN"]
#: bfloat16 keeps 8 bits: 4e-3 relative a rounding, a few of them on the way to a probability
BF16 = 2e-2


def batch() -> Any:
    return tiny_loader().batch(np.arange(30))


def joint(model: Any) -> Any:
    """The model with everything training, experts included, and `train_step` ready to be called."""
    if hasattr(model, "phases"):
        model.enter(model.phases(1)[-1])
    model._batch_index, model._epoch_index, model._max_gradient_norm = 0, 0, 10.0
    return model


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """The same model in float32 and in bfloat16, with vectors of an ordinary size."""
    models = []
    for precision in ("float32", "bfloat16"):
        model = joint(small_model(name, precision=precision, **options))
        with torch.no_grad():
            for parameter in model.embedding_layer.parameters():
                parameter.mul_(3e3)
        models.append(model.eval())
    return models[0], models[1]


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_predicts_nearly_the_same_and_in_float32(name: str) -> None:
    full, half = pair(name)
    with torch.no_grad():
        wanted, found = full(batch())["y_pred"], half(batch())["y_pred"]
    assert found.dtype == torch.float32
    assert 0 < float((found - wanted).abs().max()) <= BF16


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_training_lowers_the_loss_and_keeps_weights_float32(name: str) -> None:
    model = joint(small_model(name, precision="bfloat16", embedding_regularizer=1e-5)).train()
    losses = [model.train_step(batch()) for _ in range(12)]
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert float(losses[-1]) < 0.9 * float(losses[0])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def routings(model: Any, given: Any) -> list[Routing]:
    """What the routers answer in a forward."""
    seen: list[Routing] = []
    routers = (model.mos.item_router, model.mos.window_router)
    hooks = [router.register_forward_hook(lambda module, inputs, answer: seen.append(answer)) for router in routers]
    model(given)
    for hook in hooks:
        hook.remove()
    return seen


def test_routing_and_codebooks_are_those_of_float32() -> None:
    """Item vectors are not rounded, projected features included, and routers work in float32: not a bit differs."""
    full, half = pair("MoS_TWIN", attention_dropout=0.0, net_dropout=0.0)
    for model in (full, half):
        seed_everything(1)
        tables = model.embedding_layer.embedding_layer.embedding_layers
        tables["cate_id"] = torch.nn.Sequential(tables["cate_id"], torch.nn.Linear(8, 8))
    found, wanted = (routings(model.train(), batch()) for model in (half, full))
    assert len(wanted) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.gates.dtype == torch.float32
        assert torch.equal(ours.gates, theirs.gates) and torch.equal(ours.members, theirs.members)
        assert len(ours.gates.unique()) > 4
    codebooks = {name: value for name, value in full.state_dict().items() if ".codebook." in name}
    assert codebooks
    start = small_model("MoS_TWIN").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in codebooks.items())
    for name, value in codebooks.items():
        assert torch.equal(half.state_dict()[name], value), name


def test_float32_leaves_a_callers_autocast_alone() -> None:
    model = small_model("TWIN").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = model(batch())["y_pred"]
    with torch.no_grad():
        outside = model(batch())["y_pred"]
    assert inside.dtype == torch.float32 and not torch.equal(inside, outside)


def compiles() -> bool:
    """Whether ``torch.compile`` works on this machine's CPU, which takes a C++ compiler."""
    try:
        compiled.compile_dense(torch.nn.Identity(), torch.device("cpu"))
    except ConfigError:
        return False
    return True


def test_without_a_compiler_compile_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        raise RuntimeError("no C++ compiler found\nset CXX")

    monkeypatch.setattr(torch, "compile", broken)
    wanted = r"compile: torch.compile does not work on cpu here \(no C\+\+ compiler found\); set compile: False"
    with pytest.raises(ConfigError, match=wanted):
        small_model("TWIN", compile=True)


def test_what_is_compiled_and_that_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: seen.append(module))
    model = small_model("SIM", compile=True)
    wanted = [module for module in model.head.modules() if isinstance(module, MLP_Block)]
    assert len(wanted) == 2 and seen == wanted
    seen.clear()
    assert model.state_dict().keys() == small_model("SIM").state_dict().keys() and not seen


def train(model: Any) -> dict[str, Tensor]:
    joint(model).train()
    for _ in range(2):
        model.train_step(batch())
    return dict(model.state_dict())


@pytest.mark.slow
def test_a_compiled_head_trains_and_predicts_the_same(tmp_path: Path) -> None:
    if not compiles():
        pytest.skip("torch.compile finds no working compiler")
    options: dict[str, Any] = {"optimizer": "SGD", "learning_rate": 0.1}
    plain, fast = small_model("TWIN", **options), small_model("TWIN", compile=True, **options)
    wanted, found = train(plain), train(fast)
    for name, value in wanted.items():
        # fused kernels add in another order
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    np.testing.assert_allclose(fast.predict(tiny_loader("valid")), plain.predict(tiny_loader("valid")), atol=1e-6)
    fast.save_weights(str(tmp_path / "fast.model"))
    plain.load_weights(str(tmp_path / "fast.model"))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_on_cuda_predicts_nearly_the_same_and_trains(name: str) -> None:
    full, half = pair(name, gpu=0)
    with torch.no_grad():
        assert float((full(batch())["y_pred"] - half(batch())["y_pred"]).abs().max()) <= BF16
    half.train()
    losses = [float(half.train_step(batch())) for _ in range(12)]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@needs_cuda
def test_sparse_updates_on_cuda_equal_the_cpus() -> None:
    ends = []
    for gpu in (-1, 0):
        model = joint(small_model("TWIN", gpu=gpu, sparse_embedding_updates=True, embedding_regularizer=0.1)).train()
        loss = [float(model.train_step(batch())) for _ in range(2)]
        ends.append(torch.tensor(loss))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)

"""The layer and the whole model against loops in NumPy (fp64) that share no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe import ForwardContext, ModelConfig, MoEConfig, MoELayer, Transformer, next_token_loss

pytestmark = pytest.mark.unit
Array = NDArray[np.float64]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    return (silu(x @ gate) * (x @ up)) @ down


def moe(x_TD: Array, weights: dict[str, Array], prefix: str, k: int) -> tuple[Array, Array]:
    """Token by token, expert by expert; also the load."""
    gate = weights[prefix + "gate.weight"]
    y_TD, load_E = np.zeros_like(x_TD), np.zeros(len(gate), dtype=int)
    for t, x in enumerate(x_TD):
        prob = softmax(x @ gate.T)
        chosen = sorted(range(len(gate)), key=lambda e: (-prob[e], e))[:k]
        total = sum(prob[e] for e in chosen)
        for e in chosen:
            load_E[e] += 1
            one = (weights[f"{prefix}experts.{name}"][e] for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"))
            y_TD[t] += prob[e] / total * swiglu(x, *one)
        if prefix + "shared.w_gate.weight" in weights:
            shared = (weights[f"{prefix}shared.w_{name}.weight"].T for name in ("gate", "up", "down"))
            y_TD[t] += swiglu(x, *shared)
    return y_TD, load_E


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x_Sd: Array, theta: float) -> Array:
    """Rotate the pair (i, i + d/2) at position p by the angle p * theta^(-2i/d), as a complex number."""
    half = x_Sd.shape[1] // 2
    z = x_Sd[:, :half] + 1j * x_Sd[:, half:]
    angle = np.arange(len(x_Sd))[:, None] * theta ** (-2 * np.arange(half) / x_Sd.shape[1])
    z = z * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], 1)


def attention(x_SD: Array, weights: dict[str, Array], prefix: str, config: ModelConfig) -> Array:
    d, eps = config.width_per_head, config.norm_eps
    heads = []
    for h in range(config.num_heads):
        g = h // (config.num_heads // config.kv_heads)
        q = x_SD @ weights[prefix + "wq.weight"][h * d : (h + 1) * d].T
        k = x_SD @ weights[prefix + "wk.weight"][g * d : (g + 1) * d].T
        v = x_SD @ weights[prefix + "wv.weight"][g * d : (g + 1) * d].T
        if config.qk_norm:
            q = rms_norm(q, weights[prefix + "q_norm.weight"], eps)
            k = rms_norm(k, weights[prefix + "k_norm.weight"], eps)
        q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
        out = np.zeros_like(v)
        for s in range(len(x_SD)):
            out[s] = softmax(q[s] @ k[: s + 1].T / np.sqrt(d)) @ v[: s + 1]
        heads.append(out)
    return np.concatenate(heads, 1) @ weights[prefix + "wo.weight"].T


def transformer(ids_S: NDArray[np.int64], weights: dict[str, Array], config: ModelConfig, k: int) -> Array:
    x = weights["embed.weight"][ids_S]
    for i in range(config.num_layers):
        p = f"blocks.{i}."
        x = x + attention(rms_norm(x, weights[p + "attn_norm.weight"], config.norm_eps), weights, p + "attn.", config)
        branch = rms_norm(x, weights[p + "ffn_norm.weight"], config.norm_eps)
        if i < config.num_dense_layers:
            x = x + swiglu(branch, *(weights[f"{p}ffn.w_{name}.weight"].T for name in ("gate", "up", "down")))
        else:
            x = x + moe(branch, weights, p + "moe.", k)[0]
    head = weights["embed.weight" if config.tie_embeddings else "head.weight"]
    return rms_norm(x, weights["norm.weight"], config.norm_eps) @ head.T


def as_numpy(module: torch.nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("expert_op", ["grouped_mm", "loop"])
def test_layer_is_the_two_loops(k: int, num_shared: int, expert_op: str) -> None:
    torch.manual_seed(k)
    gate = {"name": "topk", "k": k, "renormalise": k > 1, "init_std": 1.0}
    layer = MoELayer(16, 24, 6, gate, num_shared_experts=num_shared, expert_op=expert_op)
    x = torch.randn(3, 5, 16)
    y, routing = layer(x)
    expected, load_E = moe(x.double().view(-1, 16).numpy(), as_numpy(layer), "", k)
    if k == 1:  # without renormalisation the weight is the probability itself
        prob = softmax(x.double().view(-1, 16).numpy() @ as_numpy(layer)["gate.weight"].T).max(-1)
        shared = 0.0
        if layer.shared is not None:
            shared = layer.shared(x.view(-1, 16)).detach().double().numpy()
        expected = (expected - shared) * prob[:, None] + shared
    np.testing.assert_allclose(y.detach().view(-1, 16).numpy(), expected, atol=2e-6)
    assert routing.plan.load_E.tolist() == load_E.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 1, "qk_norm": True},
        {"num_kv_heads": 2, "head_dim": 10, "tie_embeddings": False, "rope_theta": 500.0},
        {
            "num_dense_layers": 1,
            "dense_hidden_dim": 20,
            "moe": {"num_experts": 3, "hidden_dim": 8, "num_shared_experts": 1},
        },
    ],
    ids=["plain", "gqa+qk_norm", "head_dim+untied", "dense+shared"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_is_the_formulas(options: dict[str, object], dtype: torch.dtype) -> None:
    base = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 16, "init_std": 0.3}
    config = ModelConfig.model_validate({**base, "moe": {"num_experts": 5, "hidden_dim": 12}, **options})
    model = Transformer(config, {"name": "topk", "k": 2}).to(dtype)
    model.init_weights(3)
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):  # ones would hide a forgotten scale
            torch.nn.init.uniform_(param, 0.5, 1.5)
    ids_BT = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = model(ids_BT).logits_BTV.detach()
    assert logits.dtype == dtype
    for row in range(2):
        expected = transformer(ids_BT[row].numpy(), as_numpy(model), config, 2)
        # fp64 is limited by the gate and the rotary angles, which are fp32 there too.
        np.testing.assert_allclose(logits[row].numpy(), expected, atol=5e-5, rtol=1e-4)


def test_loss_is_the_mean_log_probability_of_what_follows() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7))
    targets = rng.integers(0, 7, (2, 5))
    valid = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=bool)
    expected = -sum(np.log(softmax(logits[b, t]))[targets[b, t]] for b in range(2) for t in range(5) if valid[b, t])
    nats, count = next_token_loss(torch.tensor(logits), torch.tensor(targets), torch.tensor(valid))
    assert nats.item() == pytest.approx(expected)
    assert count.item() == 7
    everything, count = next_token_loss(torch.tensor(logits), torch.tensor(targets))
    assert count.item() == 10
    assert everything > nats
    nothing, count = next_token_loss(torch.tensor(logits), torch.tensor(targets), torch.zeros(2, 5, dtype=torch.bool))
    assert (nothing.item(), count.item()) == (0.0, 0)


def test_bf16_compute_over_fp32_masters_is_close() -> None:
    config = ModelConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, moe=MoEConfig(num_experts=4, hidden_dim=32))
    model = Transformer(config, {"name": "topk", "k": 4})  # all experts, so rounding cannot change the choice
    model.init_weights(0)
    ids_BT = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    exact = model(ids_BT)
    half = model(ids_BT, context=ForwardContext(compute_dtype=torch.bfloat16))
    assert half.logits_BTV.dtype == torch.float32
    error = (half.logits_BTV - exact.logits_BTV).abs().max() / exact.logits_BTV.abs().max()
    assert 0 < error < 0.03
    nats, count = next_token_loss(half.logits_BTV, ids_BT)
    (nats / count).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())

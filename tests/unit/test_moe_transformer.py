"""The model: what a gate is told, what comes back, initial weights, errors with their place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gates import GateInput, GateNumericsError, Mode
from moe import ForwardContext, KVCache, ModelConfig, MoEConfig, Transformer, next_token_loss
from moe.initial_weights import fill_normal, stream_seed

pytestmark = pytest.mark.unit

CONFIG = ModelConfig(
    vocab_size=40,
    dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    num_dense_layers=1,
    max_seq_len=32,
    moe=MoEConfig(num_experts=4, hidden_dim=16),
)


def build(config: ModelConfig = CONFIG, gate: object = "topk", seed: int = 0) -> Transformer:
    model = Transformer(config, gate)
    model.init_weights(seed)
    return model


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def watch_gates(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[GateInput]:
    seen: list[GateInput] = []
    for _, gate in model.gates():
        forward = gate.forward
        monkeypatch.setattr(gate, "forward", lambda inp, forward=forward: (seen.append(inp), forward(inp))[1])
    return seen


def test_gates_are_told_everything(ids_BT: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    seen = watch_gates(model, monkeypatch)
    valid_BT = torch.arange(9) < torch.tensor([[9], [4]])

    def reduce_load(load_E: torch.Tensor) -> torch.Tensor:
        return load_E

    context = ForwardContext(7, Mode.TRAIN, torch.Generator().manual_seed(1), valid_BT, reduce_load)
    output = model(ids_BT, context=context)
    assert [r.layer for r in output.routing] == [1, 2]
    first, second = seen
    assert first.x_TD.shape == (18, 16)
    assert torch.equal(first.ids_T, ids_BT.flatten())
    assert torch.equal(first.valid_T, valid_BT.flatten())
    assert first.segment_T.tolist() == [0] * 9 + [1] * 9
    assert first.position_T.tolist() == [*range(9), *range(9)]
    assert (first.step, first.mode, first.reduce_load, first.replay) == (7, Mode.TRAIN, reduce_load, None)
    assert first.prev_logits_TE is None
    assert second.prev_logits_TE is output.routing[0].output.logits_TE
    assert first.rng.initial_seed() != second.rng.initial_seed()


def test_noise_depends_on_the_generator_not_on_the_order_of_use(ids_BT: torch.Tensor) -> None:
    model = build(gate={"name": "topk", "noise": "fixed", "noise_std": 4.0})

    def experts(rng: torch.Generator | None, mode: Mode = Mode.TRAIN) -> list[list[int]]:
        output = model(ids_BT, context=ForwardContext(mode=mode, rng=rng))
        return [r.output.plan.expert_N.tolist() for r in output.routing]

    rng = torch.Generator().manual_seed(3)
    first, second = experts(rng), experts(rng)
    assert first == experts(torch.Generator().manual_seed(3))
    assert first != second, "two passes with one generator must see different noise"
    assert experts(None) == experts(torch.Generator().manual_seed(3), Mode.EVAL), "noise acts in training only"


def test_mode_without_context(ids_BT: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    seen = watch_gates(model, monkeypatch)
    model(ids_BT)
    model.eval()
    model(ids_BT)
    cache = KVCache(CONFIG, batch=2)
    model(ids_BT, cache=cache)
    model(ids_BT[:, :1], cache=cache)
    assert [inp.mode for inp in seen[::2]] == [Mode.TRAIN, Mode.EVAL, Mode.PREFILL, Mode.DECODE]


def test_aux_loss_is_the_mean_over_moe_layers(ids_BT: torch.Tensor) -> None:
    output = build(gate={"name": "topk", "balance_coef": 0.5, "z_coef": 2.0})(ids_BT)
    each = [0.5 * r.output.aux["balance"] + 2.0 * r.output.aux["z"] for r in output.routing]
    torch.testing.assert_close(output.aux_loss(), (each[0] + each[1]) / 2)
    dense = build(replace_config(num_dense_layers=3))(ids_BT)
    assert dense.routing == ()
    assert dense.aux_loss() == 0


def replace_config(**options: object) -> ModelConfig:
    return ModelConfig.model_validate({**CONFIG.model_dump(), **options})


def test_padding_at_the_end_changes_nothing_before_it(ids_BT: torch.Tensor) -> None:
    model = build()
    valid_BT = torch.arange(9) < torch.tensor([[9], [4]])
    padded = model(ids_BT, context=ForwardContext(valid_BT=valid_BT)).logits_BTV
    alone = model(ids_BT[1:, :4]).logits_BTV
    torch.testing.assert_close(padded[1:, :4], alone)


def test_causality_of_the_whole_model(ids_BT: torch.Tensor) -> None:
    model = build()
    changed = ids_BT.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 40
    before, after = model(ids_BT).logits_BTV, model(changed).logits_BTV
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_last_only(ids_BT: torch.Tensor) -> None:
    model = build(replace_config(tie_embeddings=False))
    torch.testing.assert_close(model(ids_BT, last_only=True).logits_BTV, model(ids_BT).logits_BTV[:, -1:])


def test_parameter_names() -> None:
    names = set(build(replace_config(tie_embeddings=False, qk_norm=True)).state_dict())
    assert {
        "embed.weight",
        "blocks.0.attn_norm.weight",
        "blocks.0.attn.wq.weight",
        "blocks.0.attn.q_norm.weight",
        "blocks.0.ffn.w_gate.weight",
        "blocks.1.ffn_norm.weight",
        "blocks.1.moe.gate.weight",
        "blocks.1.moe.experts.w_gate_EDF",
        "blocks.2.moe.experts.w_up_EDF",
        "blocks.2.moe.experts.w_down_EFD",
        "norm.weight",
        "head.weight",
    } <= names


def test_initial_weights_have_the_stated_spread() -> None:
    moe = MoEConfig(num_shared_experts=1)
    config = ModelConfig(
        vocab_size=500, dim=64, num_layers=8, init_std=0.05, embedding_init_std=1.0, tie_embeddings=False, moe=moe
    )
    model = build(config, {"name": "topk", "init_std": 0.3})
    for name, param in model.named_parameters():
        if "norm" in name:
            assert param.eq(1).all()
            continue
        into_residual = any(part in name for part in (".wo.", "w_down"))
        std = 0.3 if ".gate." in name and ".moe.gate" in name else 0.05 / 4 if into_residual else 0.05
        std = 1.0 if name == "embed.weight" else std
        assert param.std().item() == pytest.approx(std, rel=0.1), name
        assert abs(param.mean().item()) < 0.2 * std


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    model, again, other = build(), build(), build(seed=1)
    deeper = build(replace_config(num_layers=4))
    for name, param in model.named_parameters():
        assert torch.equal(param, again.get_parameter(name))
        if "norm" not in name:
            assert not torch.equal(param, other.get_parameter(name)), name
            if ".wo." not in name and "w_down" not in name:  # those are scaled by the depth
                assert torch.equal(param, deeper.get_parameter(name)), name
    double = Transformer(CONFIG).double()
    double.init_weights(0)
    assert torch.equal(double.embed.weight.float(), model.embed.weight)
    # A rank that holds expert 2 alone gets the same numbers.
    third = torch.empty(16, 16)
    fill_normal(third, CONFIG.init_std, 0, "blocks.1.moe.experts.w_up_EDF.2")
    assert torch.equal(third, model.blocks[1].moe.experts.w_up_EDF[2])
    # Pinned: the same on every machine and in every later version.
    assert stream_seed(0, "embed.weight") == 4271693383388170409


def test_errors_name_the_place(ids_BT: torch.Tensor) -> None:
    model = build()
    model.blocks[2].moe.gate.weight.data[1] = float("inf")
    with pytest.raises(GateNumericsError, match="block 2: gate 'topk': scores of 18 of 18 tokens"):
        model(ids_BT)
    with pytest.raises(ValueError, match="33 positions are more than max_seq_len 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids_BT must be \(B, T\), got shape \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        model(torch.full((1, 2), 40))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_residual_stream_is_never_narrower_than_fp32(
    residual: torch.dtype, ids_BT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build().to(residual)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out[0].dtype)))
    watched = watch_gates(model, monkeypatch)
    output = model(ids_BT, context=ForwardContext(compute_dtype=torch.bfloat16))
    assert output.logits_BTV.dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)] * 3
    assert all(inp.x_TD.dtype == torch.bfloat16 for inp in watched)
    assert all(r.output.logits_TE.dtype == torch.float32 for r in output.routing)


def test_fp64_stays_fp64(ids_BT: torch.Tensor) -> None:
    model = build().double()
    assert model(ids_BT).logits_BTV.dtype == torch.float64


def test_every_parameter_gets_a_gradient_even_when_experts_idle() -> None:
    model = build(replace_config(moe={"num_experts": 8, "hidden_dim": 16}, qk_norm=True))
    ids_BT = torch.tensor([[1, 2]])  # at most four of eight experts
    output = model(ids_BT)
    nats, _ = next_token_loss(output.logits_BTV, ids_BT)
    (nats + output.aux_loss()).backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == []


def test_context_is_a_value() -> None:
    context = ForwardContext()
    assert replace(context, step=3).step == 3
    assert context.step == 0

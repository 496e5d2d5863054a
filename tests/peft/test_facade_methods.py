"""Fields of methods in the façade beside PEFT: each is either what PEFT makes of it, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
import surgery.peft as ours
from surgery.rules import AdaLoraRule, BiasRule, LoraRule, TokensRule, orthogonal_loss
from tests.support.facade_models import CLOSE, bert, llama, moved, out
from tests.support.peers import peft

load_file: Any = pytest.importorskip("safetensors.torch").load_file

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 8)).eval()


def run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def crosses(base: Any, mine: Any, call: Any, folder: Path) -> None:
    """What is saved of the façade, both libraries read, and what PEFT saves of it then, the façade reads."""
    expected = call(mine)
    mine.save_pretrained(folder)
    read = ours.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(call(read), expected, **CLOSE)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(call(theirs), expected, **CLOSE)
    theirs.save_pretrained(folder / "theirs")
    again = ours.PeftModel.from_pretrained(copy.deepcopy(base), folder / "theirs").eval()
    torch.testing.assert_close(call(again), expected, **CLOSE)


# Biases -------------------------------------------------------------------------------------------------------------

BIASED: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2}, "AdaLoraConfig": {"total_step": 5}, "OFTConfig": {"oft_block_size": 4}, "BOFTConfig": {},
    "HRAConfig": {"r": 4}, "VeraConfig": {"r": 4}, "RandLoraConfig": {"r": 4}, "C3AConfig": {"block_size": 8},
    "FourierFTConfig": {"n_frequency": 8}, "MissConfig": {"r": 4},
}  # fmt: skip


def biases_of(library: Any, model: Any) -> dict[str, tuple[int, ...]]:
    state = library.get_peft_model_state_dict(model)
    return {key: tuple(tensor.shape) for key, tensor in state.items() if key.endswith(".bias")}


@pytest.mark.parametrize("bias", ["all", "only"])
@pytest.mark.parametrize("name", BIASED)
def test_biases_are_trained_with_any_method_that_has_the_field(name: str, bias: str, tmp_path: Path) -> None:
    word = bias if bias == "all" else f"{ours.PEFT_TYPE_TO_CONFIG_MAPPING[_type(name)].method}_only".lower()
    fields = {"target_modules": ["0", "3"], "bias": word, **BIASED[name]}
    if name in ("VeraConfig", "RandLoraConfig"):  # sites of one size
        fields["target_modules"] = ["0"]
    theirs = peft.get_peft_model(plain(), getattr(peft, name)(**fields))
    mine = ours.get_peft_model(plain(), getattr(ours, name)(**fields))
    assert biases_of(peft, theirs) == biases_of(ours, mine) != {}
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs, mine)]
    assert count[0] == count[1]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    crosses(plain(), moved(mine).eval(), lambda model: run(model, x), tmp_path)
    assert ours.PeftConfig.from_pretrained(tmp_path).bias == word  # type: ignore[attr-defined]
    mine.merge_adapter()
    mine.unmerge_adapter()


def _type(name: str) -> str:
    return next(key for key, kind in ours.PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.__name__ == name)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_biases_beside_a_head_that_is_trained_as_a_whole(bias: str, task: str | None, tmp_path: Path) -> None:
    base, example = bert()
    fields = {"r": 2, "bias": bias, "task_type": task, "modules_to_save": ["classifier"]}
    counts = []
    for library in (peft, ours):
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**fields))
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        moved(model).eval()
    assert counts[0] == counts[1]
    crosses(base, model, lambda made: out(made, example), tmp_path)


def test_biases_of_token_classification(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    base, example = bert()
    torch.manual_seed(0)
    base = transformers.BertForTokenClassification(base.config).eval()
    mine = ours.get_peft_model(copy.deepcopy(base), ours.LoraConfig(r=2, bias="all", task_type="TOKEN_CLS"))
    example = {name: tensor for name, tensor in example.items() if name != "labels"}
    crosses(base, moved(mine).eval(), lambda made: out(made, example), tmp_path)


def test_a_rule_for_biases_in_pefts_format(tmp_path: Path) -> None:
    model = surgery.apply_rules(plain(), [LoraRule("0", rank=2), BiasRule()])
    surgery.save_adapter(model, tmp_path / "all", format="peft")
    assert ours.PeftConfig.from_pretrained(tmp_path / "all").bias == "all"  # type: ignore[attr-defined]
    some = surgery.apply_rules(plain(), [LoraRule("0", rank=2), BiasRule(["0", "2"])])
    with pytest.raises(surgery.SurgeryError, match="can't hold a BiasRule on some modules"):
        surgery.save_adapter(some, tmp_path / "some", format="peft")
    with pytest.raises(surgery.SurgeryError, match="bias"):
        ours.get_peft_model(plain(), ours.LoraConfig(target_modules=["0"], bias="some"))
    with pytest.raises(surgery.SurgeryError, match="is not implemented|neither"):
        ours.get_peft_model(plain(), ours.OFTConfig(target_modules=["0"], oft_block_size=4, bias="some"))


# AdaLoRA ------------------------------------------------------------------------------------------------------------


def adapted(library: Any, **fields: Any) -> tuple[Any, dict[str, Tensor]]:
    model, example = llama()
    settings = {"target_modules": ["q_proj"], "init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 2}
    config = library.AdaLoraConfig(**{**settings, "task_type": "CAUSAL_LM", **fields})
    return library.get_peft_model(model, config), {**example, "labels": example["input_ids"]}


def test_adalora_trains_as_in_peft() -> None:
    """The loss with its term, and each direction that is taken away."""
    theirs, example = adapted(peft)
    mine, _ = adapted(ours)
    assert ours.set_peft_model_state_dict(mine, peft.get_peft_model_state_dict(theirs)) == ([], [])
    losses, kept = [], []
    for model in (theirs, mine):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        run_losses, run_kept = [], []
        for step in range(1, 9):
            loss = model(**example).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            run_losses.append(float(loss))
            of_site = [p for name, p in model.named_parameters() if name.endswith(".E") or ".lora_E." in name]
            run_kept.append(sum(int((p != 0).sum()) for p in of_site))
        losses.append(run_losses)
        kept.append(run_kept)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and kept[0] == kept[1] and kept[0][-1] < kept[0][0]


def test_the_term_of_the_loss_is_adaloras_alone() -> None:
    mine, example = adapted(ours)
    base = mine.get_base_model()
    assert float(mine(**example).loss) > float(base(**example).loss)
    assert float(mine.forward(**example).loss) == float(mine(**example).loss)
    assert mine(**{k: v for k, v in example.items() if k != "labels"}).loss is None
    assert hasattr(mine, "update_and_allocate") and hasattr(mine.base_model, "update_and_allocate")
    lora = ours.get_peft_model(llama()[0], ours.LoraConfig(target_modules=["q_proj"]))
    assert float(lora(**example).loss) == float(lora.get_base_model()(**example).loss)
    assert not hasattr(lora, "update_and_allocate")
    without, _ = adapted(ours, orth_reg_weight=0.0)
    assert float(without(**example).loss) == float(without.get_base_model()(**example).loss)


def test_adalora_that_starts_at_random() -> None:
    for library in (peft, ours):
        torch.manual_seed(3)
        model, example = adapted(library, init_lora_weights=False)
        values = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        assert 0.9 < float(values.std()) < 1.1, library
        example.pop("labels")
        assert not torch.allclose(out(model.eval(), example), out(llama()[0], example))


def test_adalora_with_a_rank_pattern_is_written_whole(tmp_path: Path) -> None:
    theirs, example = adapted(peft)
    example.pop("labels")
    moved(theirs)
    config = theirs.peft_config["default"]
    names = [name for name, _ in theirs.get_base_model().named_parameters() if "lora_E" in name]
    config.rank_pattern = {name: [True, False, True, False] for name in names}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_E" in name:
                parameter[[1, 3]] = 0
    theirs.eval()
    theirs.save_pretrained(tmp_path / "theirs")
    read = ours.PeftModel.from_pretrained(llama()[0], tmp_path / "theirs")
    torch.testing.assert_close(out(read, example), out(theirs, example), **CLOSE)
    crosses(llama()[0], read, lambda model: out(model, example), tmp_path / "ours")


def test_adalora_without_steps_is_not_pefts(tmp_path: Path) -> None:
    model = surgery.apply_rules(plain(), AdaLoraRule("0", rank=2))
    with pytest.raises(surgery.SurgeryError, match="(?s)can't hold this AdaLoraRule.*total_step"):
        surgery.save_adapter(model, tmp_path, format="peft")
    assert (surgery.save_adapter(model, tmp_path) / "adapter.safetensors").exists()


# Starts, and sizes that PEFT chooses --------------------------------------------------------------------------------

STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olora in capitals": ("LoraConfig", {"r": 2, "init_lora_weights": "OLORA"}),
    "random randlora": ("RandLoraConfig", {"r": 4, "init_weights": False}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "random vera": ("VeraConfig", {"r": 4, "init_weights": False}),
    "vera": ("VeraConfig", {"r": 4, "projection_prng_key": 7}),
    "random oft": ("OFTConfig", {"init_weights": False}),
    "random oft by blocks": ("OFTConfig", {"init_weights": False, "r": 3, "oft_block_size": 0}),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_at_one_seed_is_pefts(name: str, tmp_path: Path) -> None:
    """On sites of three sizes, of which PEFT's projections are corners, and which OFT's blocks do not divide."""
    kind, fields = STARTS[name]
    x, made, states = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), [], []
    for library in (peft, ours):
        torch.manual_seed(2)
        model = library.get_peft_model(plain(), getattr(library, kind)(target_modules=["0", "2", "3"], **fields)).eval()
        made.append(run(model, x))
        states.append(library.get_peft_model_state_dict(model))
    torch.testing.assert_close(made[1], made[0], **CLOSE)
    shared = states[0].keys() & states[1].keys()
    assert shared == states[1].keys()
    for key in shared:
        theirs, mine = states[0][key].float(), states[1][key]
        whole = not key.startswith("base_model.randlora_")  # else zeros stand where no site's corner reaches
        used = torch.ones_like(mine, dtype=torch.bool) if whole else mine != 0
        torch.testing.assert_close(mine[used], theirs[used])
    crosses(plain(), model, lambda adapted: run(adapted, x), tmp_path)


@pytest.mark.parametrize("fields", [{"sparse": True}, {"very_sparse": True}], ids=str)
def test_sparse_projections_are_pefts(fields: dict[str, Any]) -> None:
    states = []
    for library in (peft, ours):
        model = library.get_peft_model(plain(), library.RandLoraConfig(r=4, target_modules=["0"], **fields))
        states.append(library.get_peft_model_state_dict(model))
    for name in ("A", "B"):
        torch.testing.assert_close(*(state[f"base_model.randlora_{name}"] for state in states))


@pytest.mark.parametrize("width", [8, 24, 40, 50, 64])
@pytest.mark.parametrize("fields", [{}, {"r": 5, "oft_block_size": 0}], ids=str)
def test_blocks_that_do_not_divide(width: int, fields: dict[str, Any]) -> None:
    shapes = []
    for library in (peft, ours):
        model = library.get_peft_model(
            nn.Sequential(nn.Linear(width, 8)), library.OFTConfig(target_modules=["0"], **fields)
        )
        shapes.append({key: tensor.shape for key, tensor in library.get_peft_model_state_dict(model).items()})
    assert shapes[0] == shapes[1]


def test_an_adjusted_block_is_told() -> None:
    with pytest.warns(surgery.SurgeryWarning, match=r"Invalid `oft_block_size` \(32\)! Adjusted.*24 for 24 features"):
        ours.get_peft_model(nn.Sequential(nn.Linear(24, 8)), ours.OFTConfig(target_modules=["0"]))


def test_starts_that_are_unknown() -> None:
    for library in (peft, ours):
        for start in ("PiSSA", "nonsense"):
            with pytest.raises(ValueError, match=f"Unknown initialization init_lora_weights='{start}'"):
                config = library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
                library.get_peft_model(plain(), config)
        model = library.get_peft_model(
            plain(), library.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa_niter_2")
        )
        x = torch.ones(1, 8)
        torch.testing.assert_close(run(model.eval(), x), run(plain(), x), **CLOSE)
    with pytest.warns(surgery.SurgeryWarning, match="PEFT would train B, too"):
        ours.get_peft_model(plain(), ours.LoraConfig(r=2, target_modules=["0"], init_lora_weights="MiCA"))
    with pytest.raises(surgery.SurgeryError, match="a mask by a function"):
        ours.get_peft_model(plain(), ours.ShiraConfig(r=2, target_modules=["0"], mask_type="mine"))


def test_a_bias_of_b_is_written_as_peft_reads_it(tmp_path: Path) -> None:
    """PEFT knows lora_bias with two starts and without DoRA; any other file it would refuse."""
    x = torch.randn(2, 8)
    for init in ("kaiming", "random", "gaussian", "orthogonal"):
        model = surgery.apply_rules(plain(), LoraRule("0", rank=2, lora_bias=True, init=init))
        moved(model)
        surgery.save_adapter(model, tmp_path / init, format="peft")
        theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / init).eval()
        torch.testing.assert_close(run(theirs, x), run(model, x), **CLOSE)
    fields: dict[str, Any]
    for fields in ({"dora": True}, {"init": "pissa"}, {"init": "olora"}):
        model = surgery.apply_rules(plain(), LoraRule("0", rank=2, lora_bias=True, **fields))
        with pytest.raises(surgery.SurgeryError, match="can't hold lora_bias"):
            surgery.save_adapter(model, tmp_path / "none", format="peft")


# Injection and rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoraConfig", "IA3Config", "OFTConfig", "HRAConfig", "LoHaConfig", "RoadConfig"])
def test_injection_by_a_state_dict(name: str) -> None:
    of_method: dict[str, dict[str, Any]] = {
        "IA3Config": {"feedforward_modules": []}, "OFTConfig": {"oft_block_size": 4}, "RoadConfig": {"group_size": 8},
    }  # fmt: skip
    fields = of_method.get(name, {})
    whole = peft.get_peft_model(plain(), getattr(peft, name)(target_modules=["0", "3"], **fields))
    state = {key.removeprefix("base_model.model."): t for key, t in peft.get_peft_model_state_dict(whole).items()}
    found = []
    for library in (peft, ours):
        config = getattr(library, name)(target_modules=["0", "2"], **fields)
        with pytest.warns(RuntimeWarning, match="(?s)inconsistency.*additional.*'2'.*additional.*'3'"):
            model = library.inject_adapter_in_model(config, plain(), state_dict=state)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        found.append({name.split(".")[0] for name in trained})
    assert found[0] == found[1] == {"0", "3"}


def test_injection_refuses_what_peft_refuses() -> None:
    for library in (peft, ours):
        with pytest.raises(ValueError, match="does not support prompt learning"):
            library.inject_adapter_in_model(library.PromptTuningConfig(num_virtual_tokens=2), llama()[0])
        with pytest.raises(ValueError, match="uses `target_parameters`"):
            config = library.LoraConfig(target_parameters=["0.weight"])
            library.inject_adapter_in_model(config, plain(), state_dict={"0.lora_A.weight": torch.ones(1)})


def test_two_adapters_for_one_row_are_not_live_together() -> None:
    for library in (peft, ours):
        fields = {"r": 2, "target_modules": ["q_proj"]}
        model = library.get_peft_model(llama()[0], library.LoraConfig(trainable_token_indices=[1, 2], **fields))
        model.add_adapter("other", library.LoraConfig(trainable_token_indices=[2, 3], **fields))
        with pytest.raises(ValueError, match="Only one adapter can be set at a time for TrainableTokensWrapper"):
            model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    model.add_adapter("third", ours.LoraConfig(trainable_token_indices=[5], **fields))
    model.base_model.set_adapter(["default", "third"])  # no row in common
    for library in (peft, ours):
        fields = {"r": 2, "target_modules": ["0"], "modules_to_save": ["3"]}
        model = library.get_peft_model(plain(), library.LoraConfig(**fields))
        model.add_adapter("other", library.LoraConfig(**fields))
        with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
            model.base_model.set_adapter(["default", "other"])


# Layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_adalora_on_a_convolution(stride: int, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, stride=stride, padding=1), nn.Flatten())

    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    config = ours.AdaLoraConfig(target_modules=["0"], total_step=5, init_r=2, init_lora_weights=False)
    model = ours.get_peft_model(base(), config).eval()
    crosses(base(), model, lambda adapted: run(adapted, x), tmp_path)
    expected = run(model, x)
    model.merge_adapter()
    torch.testing.assert_close(run(model, x), expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(run(model, x), expected)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    terms = []
    for adapted in (theirs.base_model, model):  # PEFT's term of the loss, computed of its own parameters
        norms = [
            torch.linalg.matrix_norm((p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(2))
            for name, p in theirs.named_parameters() if "lora_A" in name or "lora_B" in name
        ]  # fmt: skip
        terms.append(0.5 * sum(norms) / len(norms) if adapted is not model else orthogonal_loss(model))
    torch.testing.assert_close(terms[1], terms[0])
    groups = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(surgery.SurgeryError, match="Conv2d without groups"):
        ours.get_peft_model(groups, ours.AdaLoraConfig(target_modules=["0"], total_step=5))


def test_ranks_of_a_convolution_are_shared_out() -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten())
    config = ours.AdaLoraConfig(
        target_modules=["0"], total_step=4, init_r=4, target_r=2, tinit=1, init_lora_weights=False
    )
    model = ours.get_peft_model(base, config)
    for step in range(1, 5):
        model(torch.randn(2, 4, 5, 5)).square().sum().backward()
        model.update_and_allocate(step)
    assert int((base[0].adapters.default.E != 0).sum()) == 2  # type: ignore[union-attr]


def test_ln_tuning_of_any_layer(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8)))

    model = moved(ours.get_peft_model(base(), ours.LNTuningConfig(target_modules=["0", "1"]))).eval()
    x = torch.randn(2, 8)
    crosses(base(), model, lambda adapted: run(adapted, x), tmp_path)
    with pytest.raises(surgery.SurgeryError, match="target its children"):
        ours.get_peft_model(base(), ours.LNTuningConfig(target_modules=["2"]))


# Rows of an embedding alone -----------------------------------------------------------------------------------------


def with_vocabulary(tied: bool) -> Any:
    model, _ = llama()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


TOKENS: dict[str, tuple[bool, dict[str, Any]]] = {
    "the embedding": (False, {}),
    "a regular expression": (False, {"target_modules": ".*embed_tokens"}),
    "embedding and head": (False, {"target_modules": ["embed_tokens", "lm_head"]}),
    "a tied embedding": (True, {}),
}


@pytest.mark.parametrize("name", TOKENS)
def test_trainable_tokens_as_a_method(name: str, tmp_path: Path) -> None:
    tied, fields = TOKENS[name]
    ids = {"input_ids": torch.tensor([[1, 5, 7, 3]])}
    counts, states = [], []
    for library in (peft, ours):
        config = library.TrainableTokensConfig(token_indices=[5, 1], **fields)
        model = library.get_peft_model(with_vocabulary(tied), config)
        counts.append(model.get_nb_trainable_parameters())
        states.append(library.get_peft_model_state_dict(model))
        assert model.peft_config["default"].target_modules == fields.get("target_modules", "model.embed_tokens")
    assert counts[0] == counts[1]
    for key, rows in states[1].items():  # PEFT writes those of a tied head once more
        torch.testing.assert_close(rows, states[0][key])
    moved(model).eval()
    crosses(with_vocabulary(tied), model, lambda adapted: out(adapted, ids), tmp_path)


def test_rows_in_the_order_that_the_configuration_gives() -> None:
    """PEFT's rows lie in the order of the configuration's tokens, which need not be sorted."""
    ids, states = {"input_ids": torch.tensor([[1, 5, 7, 3]])}, []
    made = []
    for library in (peft, ours):
        config = library.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 1, 3])
        made.append(library.get_peft_model(with_vocabulary(False), config))
        states.append(library.get_peft_model_state_dict(made[-1]))
    key = next(key for key in states[0] if "trainable_tokens" in key)
    assert torch.equal(states[0][key], states[1][key])
    moved(made[0]).eval()
    ours.set_peft_model_state_dict(made[1], peft.get_peft_model_state_dict(made[0]))
    torch.testing.assert_close(out(made[1].eval(), ids), out(made[0], ids), **CLOSE)


def test_a_rule_for_tokens_alone_is_pefts_method(tmp_path: Path) -> None:
    base = with_vocabulary(False)
    model = surgery.apply_rules(base, TokensRule("embed_tokens", tokens=[7, 2]))
    surgery.save_adapter(model, tmp_path / "one")
    config: Any = ours.PeftConfig.from_pretrained(tmp_path / "one")
    assert isinstance(config, ours.TrainableTokensConfig) and config.token_indices == [7, 2]
    two = surgery.apply_rules(
        with_vocabulary(False), [TokensRule("embed_tokens", tokens=[7]), TokensRule("lm_head", tokens=[2])]
    )
    with pytest.raises(surgery.SurgeryError, match="the same rows of each module"):
        surgery.save_adapter(two, tmp_path / "two", format="peft")
    with pytest.raises(surgery.SurgeryError, match="names no module"):
        config = ours.TrainableTokensConfig(token_indices=[1], target_modules=["nothing"])
        ours.get_peft_model(with_vocabulary(False), config)

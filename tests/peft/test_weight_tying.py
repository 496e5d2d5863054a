"""PEFT's ensure_weight_tying: one trained copy for an embedding and the modules that share its weight."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import surgery.peft as ours
from surgery import (
    LoadError,
    PlanError,
    RuleError,
    SurgeryError,
    apply_rules,
    combine,
    load_adapter,
    merge,
    remove,
    route,
    rules_of,
    save_adapter,
    unmerge,
    using,
)
from surgery.rules import LokrRule, LoraRule, TrainRule
from surgery.testing import Snapshot
from tests.support.conformance import of_transformers
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words
IDS = torch.tensor([[3, 5, 7, 1, 9]])
LLAMA, GPT2, T5 = "LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"
SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0}
INNER = {LLAMA: "q_proj", GPT2: "c_attn", T5: "q", "RobertaForMaskedLM": "query"}
EMBEDDING = {LLAMA: "model.embed_tokens", GPT2: "transformer.wte", T5: "shared"}
PATHS = (EMBEDDING[LLAMA], "lm_head")
CASES = [(LLAMA, ["embed_tokens"]), (LLAMA, ["lm_head"]), (LLAMA, ["lm_head", "embed_tokens"]), (GPT2, ["lm_head"])]


def build(name: str = LLAMA) -> Any:
    torch.manual_seed(0)
    more = SIZES if name == T5 else {}
    return of_transformers(name, num_hidden_layers=1, tie_word_embeddings=True, **more).eval()


def config(library: Any, name: str = LLAMA, **fields: Any) -> Any:
    fields = {"target_modules": [INNER[name]], **copy.deepcopy(fields)}
    return library.LoraConfig(r=2, ensure_weight_tying=True, **fields)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).logits


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(str(folder / "adapter_model.safetensors"))


def at(model: Any, path: str) -> torch.Tensor:
    return model.get_submodule(path).adapters.default.weight


@pytest.mark.parametrize(("name", "saved"), CASES, ids=str)
def test_one_copy_is_trained_as_in_peft(name: str, saved: list[str], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(name), config(peft, name, modules_to_save=saved)).eval()
    mine = ours.get_peft_model(build(name), config(ours, name, modules_to_save=saved)).eval()
    assert at(mine, "lm_head") is at(mine, EMBEDDING[name])
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.save_pretrained(tmp_path / "start")
    ours.set_peft_model_state_dict(mine, tensors_in(tmp_path / "start"))
    assert at(mine, "lm_head") is at(mine, EMBEDDING[name])
    train(theirs)
    train(mine)
    assert torch.allclose(logits(mine), logits(theirs), atol=1e-5)  # the gradients' sums differ in order
    assert not torch.equal(logits(mine), logits(build(name)))
    for folder, model in (("theirs", theirs), ("mine", mine)):
        model.save_pretrained(tmp_path / folder)
    files = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "mine")
    assert files[0].keys() == files[1].keys()
    assert all(torch.allclose(files[1][key], value, atol=1e-5) for key, value in files[0].items())
    head = files[1]["base_model.model.lm_head.weight"]
    assert torch.equal(head, files[1][f"base_model.model.{EMBEDDING[name]}.weight"])


@pytest.mark.parametrize(("name", "saved"), CASES, ids=str)
def test_files_cross_both_ways(name: str, saved: list[str], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(name), config(peft, name, modules_to_save=saved)).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = ours.PeftModel.from_pretrained(build(name), tmp_path / "theirs", is_trainable=True).eval()
    assert torch.equal(logits(mine), logits(theirs)) and at(mine, "lm_head") is at(mine, EMBEDDING[name])
    train(mine)
    mine.save_pretrained(tmp_path / "mine")
    told = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert told["ensure_weight_tying"] is True and EMBEDDING[name] in told["modules_to_save"]
    back = peft.PeftModel.from_pretrained(build(name), tmp_path / "mine", is_trainable=True).eval()
    assert torch.equal(logits(back), logits(mine))
    pointers = {module.weight.data_ptr() for module in (back.get_input_embeddings(), back.get_output_embeddings())}
    assert len(pointers) == 1
    merged = mine.merge_and_unload()
    assert torch.allclose(logits(merged), logits(back), atol=1e-5)  # LoRA's sum in the weight


def test_all_tied_modules_of_an_encoder_and_a_decoder_have_the_copy(tmp_path: Path) -> None:
    """PEFT puts Linears in the place of tied embeddings, which take no ids: its files are compared alone."""
    theirs = peft.get_peft_model(build(T5), config(peft, T5, modules_to_save=["lm_head"]))
    mine = ours.get_peft_model(build(T5), config(ours, T5, modules_to_save=["lm_head"])).eval()
    paths = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    assert len({id(at(mine, path)) for path in paths}) == 1
    for folder, model in (("theirs", theirs), ("mine", mine)):
        model.save_pretrained(tmp_path / folder)
    assert tensors_in(tmp_path / "theirs").keys() == tensors_in(tmp_path / "mine").keys()
    plain = build(T5)
    with torch.no_grad():
        at(mine, "shared").mul_(1.5)
        plain.shared.weight.mul_(1.5)
    assert torch.equal(logits(mine), logits(plain))
    mine.save_pretrained(tmp_path / "scaled")
    assert torch.equal(logits(ours.PeftModel.from_pretrained(build(T5), tmp_path / "scaled")), logits(plain))


@pytest.mark.parametrize("tokens", [[5, 3], {"embed_tokens": [5, 3], "lm_head": [5, 3]}], ids=["list", "both"])
def test_rows_of_tokens_are_tied(tokens: Any, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(), config(peft, trainable_token_indices=tokens)).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = ours.get_peft_model(build(), config(ours, trainable_token_indices=tokens)).eval()
    rows = [mine.get_submodule(path).adapters.default.rows for path in ("lm_head", "model.embed_tokens")]
    assert rows[0] is rows[1]
    back = ours.PeftModel.from_pretrained(build(), tmp_path / "theirs").eval()
    assert torch.allclose(logits(back), logits(theirs), atol=1e-6)  # the head's rows are computed in another order
    back.save_pretrained(tmp_path / "mine")
    assert torch.equal(
        tensors_in(tmp_path / "mine")["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"],
        tensors_in(tmp_path / "theirs")["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"],
    )


TARGETS = [(LLAMA, ["lm_head"]), (LLAMA, ["embed_tokens", "q_proj"]), (LLAMA, ".*(lm_head|q_proj)"),
           (GPT2, ["lm_head", "c_attn"])]  # fmt: skip


def factors(model: Any, name: str) -> list[Any]:
    """The trained tensors of the head and of the embedding."""
    boxes = [model.get_submodule(path).adapters.default for path in ("lm_head", EMBEDDING[name])]
    return [getattr(box, which) for which in "AB" for box in boxes]


@pytest.mark.parametrize(("name", "targets"), TARGETS, ids=str)
def test_low_rank_factors_are_shared_as_in_peft(name: str, targets: Any, tmp_path: Path) -> None:
    """Both ways through files, and trained by SGD, whose steps add up: PEFT's optimizer has four parameters."""
    theirs = peft.get_peft_model(build(name), config(peft, name, target_modules=targets)).eval()
    new = ours.get_peft_model(build(name), config(ours, name, target_modules=targets)).eval()
    theirs.save_pretrained(tmp_path / "start")
    mine = ours.PeftModel.from_pretrained(build(name), tmp_path / "start", is_trainable=True).eval()
    for model in (new, mine):
        assert len({id(tensor) for tensor in factors(model, name)}) == 2
        assert torch.equal(logits(model), logits(build(name)))
    files = [library.get_peft_model_state_dict(m).keys() for library, m in ((peft, theirs), (ours, new))]
    assert not {key for key in files[0] ^ files[1] if "base_layer" not in key}  # PEFT writes the base for some names
    for model in (theirs, mine):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
        for _ in range(4):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = logits(theirs)
    assert torch.allclose(logits(mine), expected, atol=1e-4) and not torch.allclose(
        expected, logits(build(name)), atol=1e-2
    )
    mine.save_pretrained(tmp_path / "mine")
    told = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert told["ensure_weight_tying"] is True
    back = peft.PeftModel.from_pretrained(build(name), tmp_path / "mine").eval()
    assert torch.allclose(logits(back), logits(mine), atol=1e-5)
    again = ours.PeftModel.from_pretrained(build(name), tmp_path / "mine").eval()
    assert torch.equal(logits(again), logits(mine))
    expected = logits(mine)
    mine.merge_adapter()
    assert torch.allclose(logits(mine), expected, atol=1e-4)
    assert torch.equal(logits(mine.unload()), logits(build(name)))


def test_factors_beside_biases(tmp_path: Path) -> None:
    settings = config(ours, GPT2, target_modules=["lm_head", "c_attn"], bias="all")
    mine = ours.get_peft_model(build(GPT2), settings).eval()
    train(mine)
    mine.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(build(GPT2), tmp_path).eval()
    assert torch.allclose(logits(back), logits(mine), atol=1e-4)


def test_factors_start_as_those_of_pefts_head() -> None:
    """PEFT fills the shared memory last as the head's: A as torch's Linear, B zero."""
    for start in (True, "gaussian", False):
        model = ours.get_peft_model(build(), config(ours, target_modules=["lm_head"], init_lora_weights=start))
        A, _, B, _ = factors(model, LLAMA)
        assert A.shape == (2, 99) and B.shape == (32, 2) and bool(A.any()) == (start is False)
        assert 0 < B.abs().max() <= (32**-0.5 if start is True else 10)


def test_the_rule_shares_factors(tmp_path: Path) -> None:
    rule = LoraRule(["embed_tokens", "lm_head"], rank=2, init="random", tied=True)
    model = apply_rules(build(), rule)
    trained, (A, _, B, _) = logits(model), factors(model, LLAMA)
    changed = build()
    with torch.no_grad():
        changed.lm_head.weight += 4 * (B @ A).t()  # alpha / rank
    assert torch.allclose(logits(changed), trained, rtol=1e-5, atol=1e-3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len({id(tensor) for tensor in factors(other, LLAMA)}) == 2 and torch.equal(logits(other), trained)
    for kind in ("surgery", "peft"):
        save_adapter(model, tmp_path / kind, format=kind)
        load_adapter(back := build(), tmp_path / kind)
        assert len({id(tensor) for tensor in factors(back, LLAMA)}) == 2 and torch.equal(logits(back), trained)
        assert rules_of(back)[0].tied  # type: ignore[attr-defined]
    combine(model, {"default": 0.5}, "less")
    with using(model, "less"):
        A, _, B, _ = (getattr(model.get_submodule(path).adapters.less, which) for which in "AB" for path in PATHS)
        assert len({id(tensor) for tensor in (A, B)}) == 2
    with route(model, ["default", None]):
        both = model(IDS.repeat(2, 1)).logits
    assert torch.allclose(both[:1], trained, rtol=1e-5, atol=1e-3)
    assert torch.allclose(both[1:], logits(build()), atol=1e-5)


def test_modules_with_weights_of_their_own_have_their_own_factors() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    model[2].weight = model[0].weight
    apply_rules(model, LoraRule(torch.nn.Linear, rank=2, tied=True))
    first, second, third = (model.get_parameter(f"{path}.adapters.default.A") for path in range(3))
    assert first is third and first is not second


def test_factors_that_can_not_be_tied_are_refused(tmp_path: Path) -> None:
    for fields in ({"dora": True}, {"init": "pissa"}, {"invocation": [1]}):
        with pytest.raises(RuleError, match="tied"):
            LoraRule("lm_head", tied=True, **fields)  # type: ignore[arg-type]
    one = apply_rules(build(), LoraRule("lm_head", rank=2, tied=True))
    with pytest.raises(SurgeryError, match="all that share its weight"):
        save_adapter(one, tmp_path / "one", format="peft")
    with pytest.raises(PlanError, match="are targets, too"):
        both = config(ours, target_modules=["lm_head"], modules_to_save=["embed_tokens"])
        ours.get_peft_model(build(), both)
    theirs = peft.get_peft_model(build(), config(peft, target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path)
    tensors = tensors_in(tmp_path)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    safetensors.torch.save_file(tensors, str(tmp_path / "adapter_model.safetensors"))
    model = build()
    before = Snapshot(model)
    with pytest.raises(LoadError, match="the two modules share one weight"):
        load_adapter(model, tmp_path)
    assert not before.differences(model)


def test_a_head_with_a_bias_is_refused() -> None:
    """PEFT's copy of the head has no bias: its model loses the base's bias."""
    name = "RobertaForMaskedLM"
    with pytest.raises(PlanError, match=r"lm_head\.decoder has bias beside the tied weight"):
        ours.get_peft_model(build(name), config(ours, name, modules_to_save=["lm_head"]))


def test_a_file_may_have_the_copy_once_and_not_two_copies(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build(), config(peft, modules_to_save=["lm_head"])).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path)
    file, tensors = str(tmp_path / "adapter_model.safetensors"), tensors_in(tmp_path)
    head = tensors.pop("base_model.model.lm_head.weight")
    safetensors.torch.save_file(tensors, file)
    assert torch.equal(logits(ours.PeftModel.from_pretrained(build(), tmp_path)), logits(theirs))
    safetensors.torch.save_file({**tensors, "base_model.model.lm_head.weight": head + 1}, file)
    model = build()
    before = Snapshot(model)
    with pytest.raises(LoadError, match="two matrices for tied modules"):
        load_adapter(model, tmp_path)
    assert not before.differences(model)


def test_the_rule_shares_one_copy(tmp_path: Path) -> None:
    model, rules = build(), [LoraRule("q_proj", rank=2), TrainRule(["embed_tokens", "lm_head"], tied=True)]
    before = Snapshot(model)
    apply_rules(model, rules)
    train(model)
    trained = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert at(other, "lm_head") is at(other, "model.embed_tokens") and torch.equal(logits(other), trained)
    for kind in ("surgery", "peft"):
        save_adapter(model, tmp_path / kind, format=kind)
        load_adapter(back := build(), tmp_path / kind)
        assert at(back, "lm_head") is at(back, "model.embed_tokens") and torch.equal(logits(back), trained)
        assert any(isinstance(rule, TrainRule) and rule.tied for rule in rules_of(back))
    merge(model, untie=True)
    assert torch.allclose(logits(model), trained, atol=1e-5)  # LoRA's sum in the weight
    unmerge(model)
    assert torch.equal(logits(model), trained)
    remove(model)
    assert not before.differences(model)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 3]}], ids=str)
def test_options_of_tensors_keep_the_copy_shared(fields: dict[str, Any], tmp_path: Path) -> None:
    name = "weight" if "modules_to_save" in fields else "rows"

    def both(model: Any) -> list[Any]:
        return [getattr(model.get_submodule(at).adapters.default, name) for at in ("lm_head", "model.embed_tokens")]

    theirs = peft.get_peft_model(build(), config(peft, **fields)).eval()
    train(theirs)
    half = ours.get_peft_model(build().half(), config(ours, **fields), autocast_adapter_dtype=False)
    assert both(half)[0] is both(half)[1] and both(half)[0].dtype == torch.float16
    mine = ours.get_peft_model(build(), config(ours, **fields), low_cpu_mem_usage=True).eval()
    assert both(mine)[0] is both(mine)[1] and both(mine)[0].is_meta
    state = peft.get_peft_model_state_dict(theirs)
    state.pop("base_model.model.lm_head.weight", None)  # the same copy once more
    ours.set_peft_model_state_dict(mine, state)
    assert both(mine)[0] is both(mine)[1] and torch.allclose(logits(mine), logits(theirs), atol=1e-6)


def test_without_it_each_module_has_its_own_copy() -> None:
    model = apply_rules(build(), [TrainRule(["embed_tokens", "lm_head"])])
    assert at(model, "lm_head") is not at(model, "model.embed_tokens")


def test_what_the_format_can_not_tie_is_refused(tmp_path: Path) -> None:
    part = apply_rules(build(T5), [LoraRule("q", rank=2), TrainRule("re:shared|lm_head", tied=True)])
    with pytest.raises(SurgeryError, match="and of all modules that share its weight, and no others"):
        save_adapter(part, tmp_path / "a", format="peft")
    other = apply_rules(build(), [LokrRule("q_proj"), TrainRule(["embed_tokens", "lm_head"], tied=True)])
    with pytest.raises(SurgeryError, match="PEFT has no ensure_weight_tying with LOKR"):
        save_adapter(other, tmp_path / "b", format="peft")

"""A program for a new installation: adapt two layers, merge, unmerge and remove.

The tests of the wheel and `make release` run this file with `python -I` in an empty environment, so it
imports nothing from the source tree.
"""

from __future__ import annotations

import copy
import sys


def main() -> None:
    import torch
    from torch import nn

    import surgery
    from surgery import apply_rules, merge, remove, rules, unmerge
    from surgery.rules import LoraRule, TrainRule

    assert "transformers" not in sys.modules, "import surgery imports transformers"
    for module in (rules, surgery):
        assert str(module.__file__).startswith(sys.prefix), f"{module.__file__} is not in {sys.prefix}"
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 8)
    base = model(x)
    chosen = [LoraRule("re:0", rank=2, init="random"), TrainRule("re:2")]
    live = apply_rules(model, chosen, example_inputs=x)(x)
    assert not torch.equal(live, base), "LoRA changes nothing"
    merge(model)
    torch.testing.assert_close(model(x), live)
    unmerge(model)
    assert torch.equal(model(x), live), "unmerge does not give the live output back"
    remove(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(x), base) and type(model[0]) is nn.Linear
    print(f"model-surgery {surgery.__version__} with torch {torch.__version__}: apply, merge, unmerge and remove work")


if __name__ == "__main__":
    main()

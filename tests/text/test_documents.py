"""Documents apart: every proved family reads a packed document as it reads it alone, and others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import ALSO, PROVED, config
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from halve.errors import AnatomyError, TrainError
from halve.model.checkpoint import Checkpoint
from halve.model.head import split
from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe
from halve.text import documents
from halve.text.batch import Batch
from halve.text.course import open_course
from halve.text.tokenize import Separator, separator
from halve.train.objectives.logits import cross_entropy

END = Separator(2, ends=True)
SHORT, LONG = [9, 4, 2], [5, 6, 7, 8, 9, 10, 11, 12, 13, 2]


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(name)).double().eval()
    return model


def packed(*texts: list[int], size: int) -> Batch:
    ids = torch.tensor([token for text in texts for token in text]).reshape(-1, size)
    return Batch(ids, tuple(range(len(ids))), documents.positions(ids, END))


@pytest.mark.parametrize("name", PROVED + ALSO)
def test_a_packed_loss_is_the_sum_of_the_documents_losses(name: str) -> None:
    model = family(name)
    body, head = split(model)
    objective = cross_entropy()

    def loss_and_gradient(batches: list[Batch]) -> tuple[float, int, Tensor]:
        model.zero_grad(set_to_none=True)
        loss, count = torch.zeros(()), 0
        for batch in batches:
            summed, num_tokens = objective(body, head, batch)
            loss, count = loss + summed, count + num_tokens
        loss.backward()
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return float(loss.detach()), count, torch.cat(grads)

    together = packed(SHORT, LONG, SHORT, LONG, SHORT, SHORT, size=16)
    rows = [[SHORT, LONG, SHORT], [LONG, SHORT, SHORT]]
    alone = [Batch(torch.tensor([text]), (0,)) for row in rows for text in row]
    want, want_count, want_gradient = loss_and_gradient(alone)
    have, count, gradient = loss_and_gradient([together])
    assert count == want_count == 4 * 2 + 2 * 9
    assert have == pytest.approx(want, rel=1e-5)  # norms and softmax of most families compute in float32
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-5)
    joined, _, _ = loss_and_gradient([Batch(together.ids, together.numbers)])
    assert abs(joined / (2 * 15) - want / want_count) > 1e-4, "joined they are read otherwise"


@pytest.mark.parametrize("name", PROVED + ALSO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_proved_families_pass_the_check(name: str, dtype: torch.dtype) -> None:
    documents.require_apart(family(name).to(dtype))


@pytest.mark.parametrize(
    "model",
    [
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=64,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
                max_position_embeddings=64,
            )
        ),
        lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    ],
    ids=["opt", "bloom"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_reads_across_boundaries_is_refused(
    model: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    with pytest.raises(AnatomyError, match="does not keep packed documents apart") as caught:
        documents.require_apart(model().to(dtype).eval())
    assert "differ by" in caught.value.why
    assert caught.value.fix == "set data.documents to joined"


def test_a_tokenizer_without_separators_is_refused() -> None:
    assert documents.require_separator(END) is END
    with pytest.raises(TrainError, match=r"documents cannot be kept apart\n.*neither an end-of-sequence"):
        documents.require_separator(None)


def test_both_are_found_before_weights_load(
    make_recipe: Callable[..., Recipe], corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = {"train": [str(corpus / "train.txt")], "valid": [str(corpus / "valid.txt")], "context": 32}
    recipe = make_recipe(data={**data, "documents": "apart"})
    assert pipeline.check(recipe) == ()
    tokenizer = Checkpoint.open(recipe.model).tokenizer
    tokenizer.eos_token = tokenizer.bos_token = None
    assert separator(tokenizer) is None
    monkeypatch.setattr(Checkpoint, "tokenizer", tokenizer)
    assert [error.what for error in pipeline.check(recipe)] == ["documents cannot be kept apart"]
    training = make_recipe(distill={"tokens": 640, "batch": 4}).distill
    assert training is not None
    with pytest.raises(TrainError, match="documents cannot be kept apart"):
        open_course(recipe, training, cache=tmp_path, tokenizer=tokenizer)
    assert pipeline.check(make_recipe()) == ()

    def crossing(model: PreTrainedModel) -> None:
        raise AnatomyError("reads across boundaries", why="", fix="")

    monkeypatch.undo()
    monkeypatch.setattr(documents, "require_apart", crossing)
    assert [error.what for error in pipeline.check(recipe)] == ["reads across boundaries"]
    assert pipeline.check(make_recipe()) == ()

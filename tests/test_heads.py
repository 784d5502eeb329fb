"""The heads for fine-tuning: their numbers by hand, padding, what they start from, and that they learn."""

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.testing import assert_close

from modeling_nanogpt import (
    NanoGPTForCausalLM,
    NanoGPTForQuestionAnswering,
    NanoGPTForSequenceClassification,
    NanoGPTForTokenClassification,
    NanoGPTModel,
)
from modeling_nanogpt.modeling_nanogpt import CACHE
from support.models import VOCAB, make_model, make_tokens

PAD = 0
LENGTHS = [3, 9, 6]
HEADS = {
    "AutoModelForSequenceClassification": NanoGPTForSequenceClassification,
    "AutoModelForTokenClassification": NanoGPTForTokenClassification,
    "AutoModelForQuestionAnswering": NanoGPTForQuestionAnswering,
}


def make_head(cls):
    return make_model(cls, num_labels=3, pad_token_id=PAD)


def texts():
    """Texts of several lengths, none of which has the token for padding."""
    return [1 + make_tokens(length, seed=length) % (VOCAB - 1) for length in LENGTHS]


def padded(rows, side):
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, pad, value=PAD) for row, pad in zip(rows, pads, strict=True)])
    return ids, (ids != PAD).long()


def hidden_of(model, row):
    """The hidden states of a text alone (T, C)."""
    return model.transformer(row[None]).last_hidden_state[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_classified_in_a_batch_as_alone_by_its_last_token(side):
    model, labels = make_head(NanoGPTForSequenceClassification), torch.tensor([2, 0, 1])
    ids, mask = padded(texts(), side)
    output = model(ids, attention_mask=mask, labels=labels)
    expected = torch.stack([model.score.weight @ hidden_of(model, row)[-1] for row in texts()])
    assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    assert_close(output.loss, F.cross_entropy(expected, labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_classified_in_a_batch_as_alone(side):
    model = make_head(NanoGPTForTokenClassification)
    ids, mask = padded(texts(), side)
    labels = torch.where(mask.bool(), ids % 3, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    expected = torch.cat([F.linear(hidden_of(model, row), model.score.weight, model.score.bias) for row in texts()])
    assert_close(output.logits[mask.bool()], expected, atol=1e-5, rtol=1e-5)
    assert_close(output.loss, F.cross_entropy(expected, torch.cat(texts()) % 3), atol=1e-5, rtol=1e-5)


def test_an_answer_starts_and_ends_where_two_rows_of_the_head_say():
    model, row = make_head(NanoGPTForQuestionAnswering), texts()[1]
    start, end = torch.tensor([2]), torch.tensor([7])
    output = model(row[None], start_positions=start, end_positions=end)
    logits = F.linear(hidden_of(model, row), model.qa_outputs.weight, model.qa_outputs.bias)
    assert_close(output.start_logits[0], logits[:, 0])
    assert_close(output.end_logits[0], logits[:, 1])
    losses = [F.cross_entropy(logits[None, :, i], target) for i, target in enumerate((start, end))]
    assert_close(output.loss, sum(losses) / 2)


@pytest.mark.parametrize("auto", HEADS)
def test_a_head_starts_from_a_language_model_and_comes_back(auto, tmp_path):
    language_model = make_model()
    language_model.save_pretrained(tmp_path / "language")
    load = getattr(transformers, auto).from_pretrained
    head = load(tmp_path / "language", num_labels=3)
    assert type(head) is HEADS[auto] and head.get_input_embeddings() is head.transformer.wte
    for name, weight in language_model.transformer.state_dict().items():
        assert torch.equal(head.transformer.state_dict()[name], weight), name
    new = {name: weight for name, weight in head.named_parameters() if not name.startswith("transformer.")}
    matrices = [weight for weight in new.values() if weight.ndim == 2]
    assert len(matrices) == 1 and matrices[0].std().item() == pytest.approx(0.3, rel=0.3)  # initializer_range
    head.save_pretrained(tmp_path / "head")
    again = load(tmp_path / "head")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in head.state_dict().items())


@pytest.mark.parametrize("auto", HEADS)
def test_a_head_learns(auto):
    model, ids = make_model(HEADS[auto], num_labels=3, initializer_range=0.05), 1 + make_tokens(12, 8) % (VOCAB - 1)
    labels = {"labels": ids[:, -1] % 3}
    if auto == "AutoModelForTokenClassification":
        labels = {"labels": ids % 3}
    if auto == "AutoModelForQuestionAnswering":
        labels = {"start_positions": ids.argmax(1), "end_positions": ids.argmin(1)}
    model.config.pad_token_id = PAD
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = model(ids, **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("cls", [NanoGPTModel, NanoGPTForCausalLM])
def test_padding_on_the_left_moves_no_position(cls):
    model = make_model(cls)
    ids, mask = padded(texts(), "left")
    together = model(ids, attention_mask=mask)[0]
    cut = model(ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
    cached = model(ids[:, -2:], attention_mask=mask, **{CACHE: cut[CACHE]})[0]
    for row, states, last in zip(texts(), together, cached, strict=True):
        alone = model(row[None])[0][0]
        assert_close(states[-len(row) :], alone, atol=1e-4, rtol=1e-4)
        assert_close(last, alone[-2:], atol=1e-4, rtol=1e-4)


def test_a_lora_adapter_carries_the_head_that_it_was_trained_with(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    make_model().save_pretrained(tmp_path / "language")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    settings = {"num_labels": 3, "pad_token_id": PAD}
    adapted = peft.get_peft_model(
        load(tmp_path / "language", **settings), peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    )
    ids, labels = 1 + make_tokens(12, 8) % (VOCAB - 1), torch.arange(12) % 3
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(5):
        adapted(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "language", **settings), tmp_path / "adapter")
    assert_close(again(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)

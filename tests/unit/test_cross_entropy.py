"""Cross-entropy equals that of plain transformers, one document at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.data.tokenize import encode, parts
from mergelaw.evaluation import cross_entropy
from mergelaw.evaluation.cross_entropy import PADDING, batches, cut, nll
from models import ARCHITECTURES, documents, load, tokenizer, write_checkpoint


def alone(model, windows, count) -> np.ndarray:
    """Each window by itself through transformers' own loss: labels -100 where not scored."""
    total = np.zeros(count)
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window.ids])
            labels = torch.full_like(ids, -100)
            labels[0, window.start : window.stop] = ids[0, window.start : window.stop]
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            total[window.document] += loss.item() * (window.stop - window.start)
    return total


def relative(found, wanted) -> float:
    return float(np.max(np.abs(found - wanted) / wanted))


def encoded(chat, max_tokens=1000, policy="refuse", bos=False):
    items = documents(chat)
    return encode(tokenizer(bos), items, max_tokens, policy, "the set"), len(items)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model(request, tmp_path_factory):
    return load(write_checkpoint(tmp_path_factory.mktemp("m") / "base", request.param, bos=True))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_it_equals_one_document_at_a_time(model, chat, bos, batch_tokens):
    found, count = encoded(chat, bos=bos)
    wanted = alone(model, found.windows, count)
    made = batches(found.windows, batch_tokens, "cpu")
    assert relative(nll(model, made, count), wanted) < 1e-6


@pytest.mark.parametrize("policy", ["split", "truncate"])
def test_so_it_does_for_long_documents(model, policy):
    found, count = encoded(True, 60, policy)
    assert found.long_documents
    wanted = alone(model, found.windows, count)
    assert relative(nll(model, batches(found.windows, 256, "cpu"), count), wanted) < 1e-6


def test_a_whole_document_is_the_loss_of_its_text(model):
    """By hand, without any window of ours: log-softmax of the logits at the token before."""
    items = documents(chat=False, count=3)
    ours = tokenizer(bos=True)
    found = encode(ours, items, 1000, "refuse", "the set")
    values = nll(model, batches(found.windows, 1000, "cpu"), len(items))
    for value, document in zip(values, items, strict=True):
        ids = [ours.bos_token_id, *ours(document.response)["input_ids"]]
        assert ids == parts(ours, [document])[0][0].ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double()
        logs = logits.log_softmax(-1)
        by_hand = -sum(logs[t - 1, ids[t]].item() for t in range(1, len(ids)))
        assert value == pytest.approx(by_hand, rel=1e-6)


def test_the_same_set_gives_the_same_bits_whatever_came_before(tmp_path):
    model = load(write_checkpoint(tmp_path / "base"))
    found, count = encoded(True)
    other, others = encoded(False)
    made, more = (batches(e.windows, 300, "cpu") for e in (found, other))
    first = nll(model, made, count)
    nll(model, more, others)
    again = nll(model, batches(found.windows, 300, "cpu"), count)
    assert first.tobytes() == again.tobytes()
    assert first.dtype == np.float64


def test_logits_widened_in_pieces_change_no_bit(tmp_path, monkeypatch):
    model = load(write_checkpoint(tmp_path / "base", dtype="float32"))
    found, count = encoded(True)
    made = batches(found.windows, 1000, "cpu")
    whole = nll(model, made, count)
    monkeypatch.setattr(cross_entropy, "LOGITS", 7 * len(tokenizer()))
    pieces = nll(model, made, count)
    assert pieces == pytest.approx(whole, rel=1e-7)


def test_bfloat16_is_near_float32(tmp_path):
    folder = write_checkpoint(tmp_path / "base")
    found, count = encoded(True)
    made = batches(found.windows, 1000, "cpu")
    half, full = (nll(load(folder, dtype), made, count) for dtype in ("bfloat16", "float32"))
    assert relative(half, full) < 0.05
    assert (half != full).all()


def test_a_loss_that_is_none_stays_one(tmp_path):
    model = load(write_checkpoint(tmp_path / "base"))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    found, count = encoded(True)
    assert np.isnan(nll(model, batches(found.windows, 1000, "cpu"), count)).all()


def test_a_model_that_returns_all_logits_is_scored_the_same(tmp_path):
    model = load(write_checkpoint(tmp_path / "base"))
    found, count = encoded(True)
    made = batches(found.windows, 1000, "cpu")
    wanted = nll(model, made, count)

    def without(logits_to_keep, **given):
        return model(**given)

    assert relative(nll(without, made, count), wanted) < 1e-6


# Batches


def test_batches_hold_every_scored_token_once():
    found, _ = encoded(True, 60, "split")
    seen = []
    for batch in batches(found.windows, 200, "cpu"):
        seen += zip(batch.documents.tolist(), batch.targets.tolist(), strict=True)
        assert (batch.scored < len(batch.ids) * len(batch.keep)).all()
        rows, columns = (
            batch.scored // len(batch.keep),
            torch.tensor(batch.keep)[batch.scored % len(batch.keep)],
        )
        assert torch.equal(batch.ids[rows, columns + 1], batch.targets)
    wanted = [(w.document, t) for w in found.windows for t in w.ids[w.start : w.stop]]
    assert sorted(seen) == sorted(wanted)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(2, 3000), min_size=1, max_size=80),
    batch_tokens=st.integers(1, 20_000),
)
def test_padding_stays_under_its_share(lengths, batch_tokens):
    lengths = sorted(lengths, reverse=True)
    made = cut(lengths, batch_tokens)
    assert [start for start, _ in made] == [0, *(stop for _, stop in made[:-1])]
    assert made[-1][1] == len(lengths)
    sizes = [lengths[start] * (stop - start) for start, stop in made]
    for (start, stop), size in zip(made, sizes, strict=True):
        assert size <= batch_tokens or stop - start == 1
    assert sum(sizes) - sum(lengths) <= PADDING * sum(lengths)


def test_equal_lengths_fill_their_batches():
    assert cut([10] * 7, 30) == [(0, 3), (3, 6), (6, 7)]

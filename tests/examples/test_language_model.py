"""The language model example, at a size that trains in seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .loading import example


@pytest.fixture(scope="module")
def lm() -> Iterator[Any]:
    with example("language_model") as module:
        yield module


@pytest.fixture(scope="module")
def library(lm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return lm.python_text()


@pytest.fixture(scope="module")
def text(library: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    train, heldout = library
    return train[:200_000], heldout[:50_000]


@pytest.fixture
def tiny(lm: Any) -> Any:
    return lm.Settings(steps=10, batch=4, context=48, width=32, heads=2, layers=2, generate=8)


BUDGET = 1e-4
"""Bits that two right implementations may differ by after ten steps; float32 rounding, fed back through training."""


def test_flash_learns_as_the_attention_of_torch(lm: Any, text: Any, tiny: Any):
    ours, torchs = (lm.train(name, tiny, text)[1] for name in ("flash", "sdpa"))
    assert ours.parameters == torchs.parameters
    assert len(ours.losses) == tiny.steps
    differences = [abs(a - b) for a, b in zip(ours.losses, torchs.losses, strict=True)]
    assert max(differences) < BUDGET
    assert abs(ours.heldout[-1][1] - torchs.heldout[-1][1]) < BUDGET


def test_the_budget_above_sees_a_slightly_wrong_attention(lm: Any, text: Any, tiny: Any, monkeypatch: Any):
    right = lm.train("flash", tiny, text)[1]
    other_seed = lm.train("flash", replace(tiny, seed=1), text)[1]
    flash = lm.MIXERS["flash"]

    def wrong(width: int, heads: int) -> torch.nn.Module:
        mixer: Any = flash(width, heads)
        mixer.attention.window = (40, 0)  # the last seven rows of 48 lose their first keys
        return mixer

    monkeypatch.setitem(lm.MIXERS, "flash", wrong)
    for other in (other_seed, lm.train("flash", tiny, text)[1]):
        assert max(abs(a - b) for a, b in zip(right.losses, other.losses, strict=True)) > BUDGET


def test_the_same_seed_repeats_a_run(lm: Any, text: Any, tiny: Any):
    first, second = (lm.train("flash", replace(tiny, steps=3), text)[1] for _ in range(2))
    assert (first.losses, first.heldout, first.sample) == (second.losses, second.heldout, second.sample)


def test_it_learns(lm: Any, text: Any, tiny: Any):
    train, heldout = text
    heard = []
    model, result = lm.train("flash", replace(tiny, steps=150), text, lambda *said: heard.append(said))
    known = lm.baselines(train, heldout)
    assert result.losses[0] == pytest.approx(8.0, abs=1e-4)
    assert result.heldout[-1][1] < known["order 0"] - 0.3
    assert [step for step, _ in result.heldout] == [18, 36, 54, 72, 90, 108, 126, 144, 150]
    assert heard[-1] == (150, result.losses[-1], result.tokens_per_second)
    assert result.tokens_per_second > 0
    assert result.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["flash", "sdpa", "lightning", "based", "delta", "lstm", "slstm", "hyena"])
def test_a_mixer_sees_no_later_byte(lm: Any, tiny: Any, name: str):
    torch.manual_seed(0)
    model = lm.LanguageModel(lm.MIXERS[name], tiny).eval()
    torch.nn.init.normal_(model.head.weight)
    text = torch.randint(256, (1, tiny.context))
    changed = text.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-6


@pytest.fixture
def writer(lm: Any, tiny: Any) -> Any:
    """A model whose text is neither constant nor noise; float64, so that rounding decides no byte."""
    torch.manual_seed(0)
    model = lm.LanguageModel(lm.MIXERS["flash"], tiny).double().eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def test_text_from_memory_is_the_text_of_recomputing(lm: Any, tiny: Any, writer: Any):
    """Also past the context, and with a prompt that is longer than it."""
    settings = replace(tiny, generate=2 * tiny.context + 10)
    for prompt in (b"    def ", bytes(range(60))):
        (remembered, speed), (recomputed, _) = (
            lm.generate(writer, settings, prompt, remember=remember) for remember in (True, False)
        )
        assert remembered == recomputed
        assert len(set(remembered)) > 20
        assert speed > 0
    assert lm.generate(writer, replace(settings, seed=1))[0] != lm.generate(writer, settings)[0]


def test_memory_reads_each_byte_once(lm: Any, tiny: Any, writer: Any):
    """Until the context is full; then its newer half is read again."""
    read: list[int] = []
    writer.bytes.register_forward_hook(lambda module, arguments, result: read.append(arguments[0].shape[1]))
    full, half = tiny.context, tiny.context // 2
    lm.generate(writer, replace(tiny, generate=2 * full))
    prompt, steps = len(b"    def "), full - len(b"    def ")
    assert read[: steps + 2] == [prompt] + [1] * steps + [half]
    assert sum(read) < 5 * full
    read.clear()
    lm.generate(writer, replace(tiny, generate=4), remember=False)
    assert read == [prompt, prompt + 1, prompt + 2, prompt + 3]


def test_mixers_without_memory_recompute(lm: Any, text: Any, tiny: Any):
    flash, sdpa = (lm.train(name, replace(tiny, steps=2), text) for name in ("flash", "sdpa"))
    assert flash[0].memories() is not None
    assert sdpa[0].memories() is None
    assert flash[1].written_per_second > 0
    assert sdpa[1].written_per_second is None
    assert sdpa[1].recomputed_per_second > 0


def test_sparse_evaluation_of_a_dense_model(lm: Any, text: Any, tiny: Any):
    """Trained as flash is; with room for all keys it is flash, and with few it is something else."""
    settings = replace(tiny, context=64)
    dense, sparse = (lm.train(name, settings, text)[1] for name in ("flash", "hip"))
    assert max(abs(a - b) for a, b in zip(dense.losses, sparse.losses, strict=True)) < BUDGET
    assert [budget for budget, _ in sparse.by_budget] == [8, 16, 32, 64]
    assert dense.by_budget == []
    model, again = lm.train("hip", settings, text)
    assert again.by_budget == sparse.by_budget
    model.train()
    before = model(text[1][None, :64].long())
    model.eval()
    set_budget(model, 64)
    everything = model(text[1][None, :64].long())
    set_budget(model, 8)
    few = model(text[1][None, :64].long())
    torch.testing.assert_close(everything, before)
    assert (few - before).abs().max() > 1e-4


def set_budget(model: Any, budget: int) -> None:
    for block in model.blocks:
        block.mixer.attention.budget = budget


@pytest.mark.parametrize("name", ["lightning", "based", "delta", "lstm", "slstm"])
def test_a_recurrent_mixer_learns_and_writes_from_its_state(lm: Any, text: Any, tiny: Any, name: str):
    model, result = lm.train(name, tiny, text)
    assert result.losses[-1] < result.losses[0] - 0.3
    mixer, x = model.blocks[0].mixer, torch.randn(1, 40, tiny.width)
    with torch.no_grad():
        memory = mixer.memory(tiny.context)
        pieces = torch.cat([mixer(part, memory) for part in x.split([20, 1, 1, 18], dim=1)], dim=1)
        torch.testing.assert_close(pieces, mixer(x), rtol=1e-4, atol=1e-5)


def test_text_is_the_standard_library_split_by_file(lm: Any, library: tuple[torch.Tensor, torch.Tensor]):
    train, heldout = library
    assert train.dtype == heldout.dtype == torch.uint8
    assert len(train) > 5 * len(heldout) > 500_000
    assert b"import" in bytes(heldout[:100_000].tolist())
    again = lm.python_text()
    assert torch.equal(train, again[0])
    assert torch.equal(heldout, again[1])


def test_baselines_are_entropies(lm: Any):
    alternating = torch.tensor([0, 255] * 2000, dtype=torch.uint8)
    known = lm.baselines(alternating, alternating)
    assert known["order 0"] == pytest.approx(1.0, abs=0.1)
    assert known["order 1"] == pytest.approx(0.0, abs=0.02)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (400_000,), dtype=torch.uint8, generator=generator)
    assert lm.baselines(noise, noise)["order 0"] == pytest.approx(8.0, abs=0.01)


def test_bits_of_a_model_that_knows_nothing(lm: Any, tiny: Any):
    def blank(text: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*text.shape, 256)

    assert lm.bits(blank, torch.randint(256, (2, 9))).item() == pytest.approx(8.0)


def test_learning_rate_rises_then_falls(lm: Any, tiny: Any):
    settings = replace(tiny, steps=200)
    rates = [lm.learning_rate(settings, step) for step in range(200)]
    top = rates.index(max(rates))
    assert max(rates) == settings.learning_rate
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert math.isclose(rates[-1], settings.learning_rate / 10, rel_tol=0.01)


def test_command_line(lm: Any, text: Any, tiny: Any, monkeypatch: Any, tmp_path: Path, capsys: Any):
    monkeypatch.setattr(lm, "python_text", lambda: text)
    monkeypatch.setattr(lm, "SHORT", tiny)
    lm.main(["--mixer", "all", "--short", "--steps", "2", "--device", "cpu", "--out", str(tmp_path), "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((tmp_path / "results.json").read_text())
    assert report["settings"]["steps"] == 2
    assert [result["mixer"] for result in report["results"]] == [*lm.MIXERS]
    assert all(len(result["losses"]) == 2 for result in report["results"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per byte" in printed.err
    assert "written by sdpa" in printed.err


def test_command_line_refuses(lm: Any, capsys: Any):
    for arguments, message in ((["--mixer", "none"], "invalid choice"), (["--steps", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            lm.main(arguments)
        assert message in capsys.readouterr().err

"""Tones are of their pitch and smooth, what measures them notices if not; training and sampling for real, at small size."""

import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.examples import load_example

audio = load_example("audio_frames")


def tones(per_pitch: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(len(audio.PITCHES)).repeat_interleave(per_pitch)
    return audio.draw_tones(labels), labels


def test_drawn_tones_have_the_pitch_of_their_label() -> None:
    x, labels = tones()
    assert x.shape == (len(labels), audio.FRAMES, audio.FRAME)
    assert x.abs().max() <= 1
    assert (audio.read_pitch(x.flatten(1)) == labels).all()


@pytest.mark.parametrize("label", range(8))
def test_pitch_is_read_from_a_plain_sine_and_from_its_harmonics(label: int) -> None:
    turns = audio.PITCHES[label] * torch.arange(2048) / audio.RATE * 2 * torch.pi
    waves = torch.stack((turns.sin(), turns.sin() + 2 * (2 * turns).sin() + (3 * turns).cos()))
    assert audio.read_pitch(waves).tolist() == [label, label]


def test_autocorrelation_at_whole_lags_is_the_sum_of_products() -> None:
    x = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    for lag in (0, 1, 7):
        expected = (x[:, : 100 - lag] * x[:, lag:]).sum() / x.square().sum()
        found = audio.autocorrelation(x, torch.tensor([lag / audio.RATE])).item()
        assert found == pytest.approx(expected.item(), abs=1e-5)


def test_roughness_is_one_for_tones_and_more_if_frames_do_not_meet() -> None:
    x, _ = tones()
    assert audio.roughness(x) == pytest.approx(1, abs=0.1)
    assert audio.roughness(x * torch.tensor([1.0, -1.0]).repeat(audio.FRAMES // 2).unsqueeze(1)) > 2


def test_wav_holds_the_waves(tmp_path: Path) -> None:
    x, _ = tones(1)
    audio.write_wav(tmp_path / "x.wav", x.flatten(1))
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, audio.RATE)
        found = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    np.testing.assert_allclose(found / 32767, x.flatten().numpy(), atol=1e-4)


def test_pieces_train_sample_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = audio.train(audio.build(8, width=16), 3, torch.tensor(0.4), batch=4)
    labels = torch.arange(8).repeat_interleave(2)
    data, drawn = audio.draw_tones(labels, 8), audio.sample(model, labels, torch.tensor(0.4), guidance=2.0, diffusion_steps=4)
    assert drawn.shape == data.shape
    assert drawn.isfinite().all()
    audio.report("samples", drawn, labels, data)
    assert "pitch as asked" in capsys.readouterr().out
    audio.plot(data, drawn, labels, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000

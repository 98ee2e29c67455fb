"""Rules for complex numbers and Fourier transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fft

from tests.symmetry.rules.ops import Op, check, every

PAIRS = {"w": (4, 3, 2, 2)}  # for 4 channels in, 3 out, and 2 modes: pairs of real and imaginary part


def twice(h: Tensor) -> Tensor:
    """Complex numbers with the labels of h."""
    return torch.complex(h, h.relu())


def _few_modes(m: Any, h: Tensor) -> Tensor:
    """A layer of a Fourier neural operator."""
    modes = fft.rfft(h, norm="ortho")
    y = torch.zeros(len(h), 3, modes.shape[-1], dtype=modes.dtype)
    y[:, :, :2] = torch.einsum("bim,iom->bom", modes[..., :2], torch.view_as_complex(m.w))
    return fft.irfft(y, n=h.shape[-1], norm="ortho").relu()


def _mixed(m: Any, h: Tensor) -> Tensor:
    """With complex weights, which are held fixed, so that all channels must have one scale."""
    return fft.ifft(fft.fft(h, dim=2) * twice(m.known)[:, None], dim=2).real.relu()


def _written(h: Tensor, to_real: bool) -> Tensor:
    """Written through numbers of the other kind, in memory that had other labels."""
    pairs, other = torch.stack([h[0], h[0].relu()], -1), h[0].roll(2)
    if to_real:
        z = torch.view_as_complex(pairs).clone()
        torch.view_as_real(z)[:2] = torch.stack([other, other.relu()], -1)[:2]
        return (z.real + z.imag).expand(8, 4)
    torch.view_as_complex(pairs)[:2] = twice(other)[:2]
    return pairs.sum(-1).expand(8, 4)


OPS = [
    Op("_conj", lambda m, h: torch.complex(h, h.relu()).conj().abs()),
    Op("_conj", lambda m, h: torch.complex(h, h.relu()).conj().imag + h.roll(1, 1), 1),
    Op("_conj", lambda m, h: torch.complex(h, h.relu()).mH.real.T, inference=True),
    Op("_conj_physical", lambda m, h: torch._conj_physical(torch.complex(h, h.relu())).imag + h.roll(1, 1), 1),
    Op("conj_physical", lambda m, h: torch.complex(h, h.relu()).conj_physical_().imag + h.roll(1, 1), 1),
    Op("conj_physical", lambda m, h: torch.conj_physical(torch.complex(h, h.relu())).imag, inference=True),
    Op("resolve_conj", lambda m, h: torch.complex(
        h, h.relu()).conj().resolve_conj().imag + h.roll(1, 1), 1, inference=True),
    Op("resolve_conj", lambda m, h: torch.resolve_conj(h), inference=True),
    Op("resolve_neg", lambda m, h: torch.complex(
        h, h.relu()).conj().imag.resolve_neg(), inference=True),
    Op("resolve_neg", lambda m, h: torch.resolve_neg(h) + h.roll(1, 1), 1, inference=True),
    Op("view_as_real", lambda m, h: torch.view_as_real(torch.complex(h, h.relu())).sum(2)),
    Op("view_as_real", lambda m, h: torch.view_as_real(torch.complex(h, h.relu()))[..., 1] + h.roll(1, 1), 1),
    Op("view_as_complex", lambda m, h: torch.view_as_complex(h.view(8, 2, 2)).abs(), 2),
    Op("view_as_complex", lambda m, h: torch.view_as_complex(h.mT.reshape(8, 4, 2, 2).mT.contiguous()).abs(), 2, 1),
    Op("complex", lambda m, h: torch.complex(h, h.relu()).abs()),
    Op("complex", lambda m, h: torch.complex(h, h[:, :1]).real, 1, complete=False),
    Op("complex", lambda m, h: torch.complex(h, m.b).abs(), 4, 0, {"b": (4,)}),
    Op("complex", lambda m, h: (
        torch.complex(h, h.relu()) * torch.complex(m.g, m.k)).abs(), 8, 0, {"g": (4,), "k": (4,)}),
    Op("polar", lambda m, h: torch.polar(h.abs(), m.known.expand(8, 4)).real),
    Op("polar", lambda m, h: torch.polar(h.abs(), h.roll(1, 1)).real, 0),
    Op("polar", lambda m, h: torch.polar(m.known, h).real, 0),
    Op("polar", lambda m, h: torch.view_as_real(torch.complex(h, h.relu()) * torch.polar(m.known, m.known)).sum(1), 1),
    Op("view_as_complex", lambda m, h: _written(h, False), 0, complete=False),
    Op("view_as_real", lambda m, h: _written(h, True), 0, complete=False),
    Op("view_as_real", lambda m, h: twice(h.roll(1, 1))[:, 1:3].imag + h.roll(1, 1)[:, 1:3].relu()),
    Op("view_as_complex", lambda m, h: (twice(h) * torch.view_as_complex(m.w)).abs(), 4 + 4, 0, {"w": (4, 2)}),
    Op("view_as_complex", lambda m, h: (twice(h) @ torch.view_as_complex(m.w)).abs(), 4 + 3, 0, {"w": (4, 3, 2)}),
    Op("angle", lambda m, h: twice(h).angle()),
    Op("angle", lambda m, h: (twice(h) + twice(h.roll(1, 1))).angle(), 1),
    Op("_neg_view", lambda m, h: torch._neg_view(h) + h.roll(1, 1), 1, inference=True),
    # Fourier transforms
    Op("_fft_r2c", lambda m, h: fft.rfft(h).abs(), 1),
    Op("_fft_r2c", lambda m, h: fft.rfft(h).abs(), spatial=1),
    Op("_fft_r2c", lambda m, h: fft.rfft(h, dim=1)[:, :2].real, 1, 1),
    Op("_fft_c2c", lambda m, h: fft.fft2(h).imag, spatial=2),
    Op("_fft_r2c", _few_modes, 4 + 3, 1, PAIRS),
    Op("_fft_r2c", lambda m, h: fft.rfft2(h, dim=(1, 2)).abs(), 1, 1),
    Op("_fft_c2c", lambda m, h: fft.fftn(twice(h), dim=(2, 3)).abs(), spatial=2),
    Op("_fft_c2c", lambda m, h: fft.ifft(twice(h), dim=-1).conj().real, 1),
    Op("_fft_c2c", _mixed, 4, 1),
    Op("_fft_c2c", lambda m, h: fft.fft(fft.fft(h, dim=2), dim=1).real, 1, 1),  # as in FNet
    Op("_fft_c2r", lambda m, h: fft.irfft(fft.rfft(h) * fft.rfft(h.abs()), n=4), spatial=1),  # a convolution
    Op("_fft_c2r", lambda m, h: fft.irfft(fft.rfft(h) * fft.rfft(h.roll(1, 1)), n=4), 4, 1),
    Op("_fft_c2r", lambda m, h: fft.hfft(twice(h), n=5), 2),
    Op("_fft_c2r", lambda m, h: fft.irfft2(fft.rfft2(h)[..., :2]), spatial=2),
]  # fmt: skip


@every(OPS)
def test_a_rule_keeps_the_function_and_loses_no_freedom(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, monkeypatch)

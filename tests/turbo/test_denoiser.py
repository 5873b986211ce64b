"""From velocity to denoised latent: order of the calls, guidance, step cache.

The networks here return a number that the caption carries, so denoised = latent - sigma * number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from turbo.denoiser import Caption, Denoiser, ModulationTable, is_unguided
from turbo.easycache import StepCache
from turbo.sigmas import as_float32
from turbo.testing import initialise, zimage_shapes
from turbo.transformer import Transformer, TransformerConfig, padded_length

SIGMAS = (0.9, 0.5)
TABLE = ModulationTable(
    torch.arange(2.0).reshape(2, 1, 1), {as_float32(sigma): k for k, sigma in enumerate(SIGMAS)}
)


@dataclass
class Network:
    """Returns the number in each row's caption; remembers what it was called with."""

    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(
        self, latent: Tensor, tokens: Tensor, modulation: Tensor, rotary: Tensor
    ) -> Tensor:
        self.calls.append((latent, tokens, modulation, rotary))
        return tokens[:, :1, :1, None].to(latent.dtype).expand_as(latent)

    @property
    def captions(self) -> list[list[float]]:
        """The numbers in the captions of each call."""
        return [tokens[:, 0, 0].tolist() for _, tokens, _, _ in self.calls]


def caption(number: float, length: int = 10) -> Caption:
    return Caption(torch.full((1, padded_length(length), 4), number), length)


def rotary(tokens: int) -> Tensor:
    return torch.tensor(tokens)


def latent(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 2, 8, 8)


def numbers(tensor: Tensor) -> list[float]:
    return tensor[:, 0, 0, 0].tolist()


def test_the_denoised_latent_is_sigma_times_the_velocity_away():
    denoise = Denoiser(Network(), TABLE, rotary, caption(4))
    assert numbers(denoise(latent(8), 0.5)) == [6]  # 8 - 0.5 * 4


def test_guidance_goes_from_the_negatives_estimate_through_the_positives():
    # 8 - 0.5 * 4 = 6 and 8 - 0.5 * 2 = 7: 7 + 3 * (6 - 7) = 4
    for length in (10, 11):  # one call, two calls
        denoise = Denoiser(Network(), TABLE, rotary, caption(4), caption(2, length), cfg=3)
        assert numbers(denoise(latent(8), 0.5)) == [4]


def test_guidance_0_is_the_negative_caption_alone():
    denoise = Denoiser(Network(), TABLE, rotary, caption(4), caption(2), cfg=0)
    assert numbers(denoise(latent(8), 0.5)) == [7]


@pytest.mark.parametrize("cfg", [1.0, 1 + 5e-10, 1 - 5e-10])
def test_guidance_1_never_evaluates_the_negative_caption(cfg: float):
    network = Network()
    denoise = Denoiser(network, TABLE, rotary, caption(4), caption(2), cfg=cfg)
    assert numbers(denoise(latent(8), 0.5)) == [6]
    assert network.captions == [[4]]
    assert denoise.calls == 1


def test_guidance_is_1_up_to_a_relative_billionth():
    assert [is_unguided(cfg) for cfg in (1, 1 + 9e-10, 1 + 2e-9, 0, 2)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_captions_of_one_length_are_one_batch_negative_first():
    network = Network()
    denoise = Denoiser(network, TABLE, rotary, caption(4, 33), caption(2, 33), cfg=2)
    denoise(latent(8), 0.5)
    assert network.captions == [[2, 4]]
    assert denoise.calls == 1


@pytest.mark.parametrize("length", [12, 33])
def test_captions_of_two_lengths_are_two_calls_positive_first(length: int):
    # 12 and 13 tokens are padded to 32 both, and are two calls all the same.
    network = Network()
    denoise = Denoiser(network, TABLE, rotary, caption(4, 13), caption(2, length), cfg=2)
    denoise(latent(8), 0.5)
    assert network.captions == [[4], [2]]
    assert denoise.calls == 2


def test_each_call_gets_the_rotary_table_of_its_own_padded_length():
    network = Network()
    Denoiser(network, TABLE, rotary, caption(4, 12), caption(2, 33), cfg=2)(latent(8), 0.5)
    assert [int(table) for _, _, _, table in network.calls] == [32, 64]


def test_each_call_gets_the_modulation_of_its_sigma():
    network = Network()
    denoise = Denoiser(network, TABLE, rotary, caption(4))
    for sigma in (0.9, 0.5, as_float32(0.9)):
        denoise(latent(8), sigma)
    assert [float(modulation) for _, _, modulation, _ in network.calls] == [0, 1, 0]


def test_a_sigma_that_was_not_prepared_is_an_error():
    with pytest.raises(KeyError):
        Denoiser(Network(), TABLE, rotary, caption(4))(latent(8), 0.7)


def test_a_batch_of_pictures_stays_in_order_beside_two_captions():
    network = Network()
    denoise = Denoiser(network, TABLE, rotary, caption(4), caption(2), cfg=2)
    # Estimates 8 - 1 = 7 and 6, 10 - 1 = 9 and 8: 7 + 2 * (6 - 7) and 9 + 2 * (8 - 9)
    assert numbers(denoise(latent(8, 10), 0.5)) == [5, 7]
    assert network.captions == [[2, 2, 4, 4]]
    assert numbers(network.calls[0][0]) == [8, 10, 8, 10]


def test_the_network_sees_its_own_dtype_and_the_latent_keeps_float32():
    # 1 + 2**-12 is no bfloat16; the estimate 1 + 2**-12 - 0.5 * 4 must not lose it.
    table = ModulationTable(TABLE.rows.bfloat16(), TABLE.index)
    network = Network()
    denoised = Denoiser(network, table, rotary, caption(4))(latent(1 + 2**-12), 0.5)
    assert network.calls[0][0].dtype == torch.bfloat16
    assert numbers(denoised) == [2**-12 - 1]
    assert denoised.dtype == torch.float32


@pytest.mark.parametrize("length", [10, 11])
def test_a_step_cache_skips_both_captions_of_an_evaluation(length: int):
    network = Network()
    cache = StepCache(threshold=100, start=1.0, end=0.0)
    denoise = Denoiser(network, TABLE, rotary, caption(4), caption(2, length), cfg=2, cache=cache)
    for value in (8, 9, 11):
        denoised = denoise(latent(value), 0.5)
    ran = 2 * denoise.calls
    assert cache.skipped == [False] * ran + [True] * denoise.calls
    assert len(network.calls) == ran
    # Last differences 4 - 9 and 2 - 9 on 11: 6 and 4; 11 - 3 = 8 and 11 - 2 = 9: 9 + 2 * (8 - 9)
    assert numbers(denoised) == [7]


def test_each_evaluation_is_judged_anew():
    # Outputs are twice the latent: sums 0.2, then 0.2 + 0.4, as in the table of test_easycache.py.
    cache = StepCache(threshold=0.5, start=1.0, end=0.0)
    denoise = Denoiser(lambda x, *_: 2 * x, TABLE, rotary, caption(0), cache=cache)
    for value in (4, 5, 6, 7):
        denoise(latent(value), 0.5)
    assert cache.skipped == [False, False, True, False]


@pytest.mark.parametrize(("aliased", "want"), [(False, 8), (True, 3)])
def test_the_aliased_form_takes_a_skipped_estimate_from_the_changed_latent(
    aliased: bool, want: float
):
    # Skipped output 11 + (4 - 9) = 6: 11 - 0.5 * 6 = 8, or (1 - 0.5) * 6 = 3. Runs are the same.
    cache = StepCache(threshold=100, start=1.0, end=0.0)
    denoise = Denoiser(Network(), TABLE, rotary, caption(4), cache=cache, aliased=aliased)
    got = [numbers(denoise(latent(value), 0.5))[0] for value in (8, 9, 11)]
    assert got == [6, 7, want]


def test_the_latent_itself_is_never_changed():
    start = latent(8).clone()
    cache = StepCache(threshold=100, start=1.0, end=0.0)
    denoise = Denoiser(Network(), TABLE, rotary, caption(4), caption(2), cfg=2, cache=cache)
    for _ in range(3):
        denoise(start, 0.5)
    assert torch.equal(start, latent(8))


def test_a_modulation_table_has_one_row_for_each_float32_sigma():
    sizes = {"dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 1}
    shapes = zimage_shapes(sizes | {"cap_feat_dim": 8, "ffn_hidden": 32})
    transformer = Transformer(TransformerConfig.from_shapes(shapes))
    for name, value in initialise(shapes, 0).items():
        transformer.native_tensors()[name].copy_(value)
    table = ModulationTable.make(transformer, [0.9, 0.5, as_float32(0.9), 0.1])
    assert table.rows.shape == (3, 4 * 2 + 1, 16)
    assert list(table.index) == [as_float32(0.9), 0.5, as_float32(0.1)]
    torch.testing.assert_close(table[0.5], transformer.modulation_table([0.5])[0])

"""What pruning's settings leave, by hand, and what is refused."""

import pytest

from distill.compression.pruning.settings import PruningSettings, planned_sizes, units_left
from distill.compression.pruning.structure import BlockSizes, prunable_sublayers
from distill.errors import InputError
from tests.compression.pruning.test_structure import model_of
from tests.conftest import tiny_bert


@pytest.mark.parametrize(
    ("kind", "units", "share", "left"),
    [
        ("heads", 12, 0.5, 6),
        ("heads", 12, 0.99, 1),
        ("heads", 12, 0.0, 12),
        ("neurons", 1536, 0.5, 768),
        ("neurons", 1536, 0.3, 1056),  # of 1,075
        ("neurons", 3000, 0.0, 3000),
        ("neurons", 64, 0.75, 16),
        ("neurons", 0, 0.5, 0),
    ],
)
def test_units_left(kind, units, share, left):
    assert units_left(kind, units, share) == left


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"heads": 0.25}, BlockSizes((3,) * 4, (128,) * 4)),
        ({"neurons": 0.5}, BlockSizes((4,) * 4, (64,) * 4)),
        ({"heads": 0.5, "intermediate_size": 50}, BlockSizes((2,) * 4, (50,) * 4)),
        ({"heads": [4, 0, 1, 2], "neurons": 0.25}, BlockSizes((4, 0, 1, 2), (96,) * 4)),
        ({"neurons": [1, 2, 3, 128]}, BlockSizes((4,) * 4, (1, 2, 3, 128))),
        ({"neurons": 0.5, "uniform": False}, None),
        ({"speedup": 2.0}, None),
        ({"speedup": 2.0, "uniform": True}, None),
    ],
)
def test_sizes_that_settings_say(settings, sizes):
    assert planned_sizes(prunable_sublayers(tiny_bert()), PruningSettings(**settings)) == sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "say what to remove"),
        ({"heads": 0.5, "speedup": 2.0}, "heads: is chosen by speedup"),
        ({"speedup": 1.0}, "speedup: 1.0; a model becomes faster with more than 1"),
        ({"neurons": 0.5, "intermediate_size": 64}, "says the same as intermediate_size"),
        ({"heads": 1.0}, "heads: 1.0 is no share"),
        ({"neurons": -0.1}, "neurons: -0.1 is no share"),
        ({"intermediate_size": 64, "uniform": False}, "is the same in every block"),
        ({"heads": [1, 1, 1, 1], "uniform": True}, "has no effect where sizes of blocks are listed"),
        ({"neurons": 0.5, "rounds": 0}, "rounds: 0; say at least 1"),
    ],
)
def test_settings_that_are_wrong(settings, message):
    with pytest.raises(InputError, match=message):
        PruningSettings(**settings)


def test_every_problem_is_told_at_once():
    with pytest.raises(InputError) as raised:
        PruningSettings(heads=2.0, neurons=3.0, rounds=0)
    assert len(raised.value.problems) == 3


def test_sizes_that_a_model_cannot_have():
    sublayers = prunable_sublayers(tiny_bert())
    with pytest.raises(InputError, match="neurons: block 0 has 128, and 0 to as many can be left: 129"):
        planned_sizes(sublayers, PruningSettings(intermediate_size=129))
    with pytest.raises(InputError, match="heads: 1 sizes, and the model has 4 blocks"):
        planned_sizes(sublayers, PruningSettings(heads=[1]))
    with pytest.raises(InputError, match="heads: block 0 has 4, and 1 to as many can be left: 0"):
        planned_sizes(prunable_sublayers(model_of("AlbertConfig")[0]), PruningSettings(heads=[0]))

"""Tables of names, read both ways."""

from speculators.formats.names import TensorNames

NAMES = TensorNames(
    (("midlayer.", "layers.0."), ("layers.0.", "layers.0."), ("norm.", "norm."), ("d2t", "d2t"), ("old.", "")),
    before=("model.",),
)


def test_a_beginning_is_translated_and_the_rest_kept():
    """TensorNames that end in a dot are beginnings; the first that fits counts, both ways."""
    assert NAMES.ours("midlayer.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert NAMES.ours("layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert NAMES.theirs("layers.0.mlp.up_proj.weight") == "midlayer.mlp.up_proj.weight"
    assert NAMES.ours("model.norm.weight") == "norm.weight"


def test_a_whole_name_is_not_a_beginning():
    """d2t is a tensor, d2t_extra is another."""
    assert NAMES.ours("d2t") == "d2t"
    assert NAMES.ours("d2t_extra") is None


def test_a_name_without_meaning_is_left_out_and_an_unknown_one_is_told():
    """ "" and None are different answers."""
    assert NAMES.ours("old.weight") == ""
    assert NAMES.ours("new.weight") is None
    assert NAMES.theirs("old.weight") is None

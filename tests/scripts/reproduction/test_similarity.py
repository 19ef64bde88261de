import pytest
import torch
import torch.nn.functional as F

import sbp
from scripts.reproduction.similarity import SHARES, similarities
from tests.conftest import images, small_convnext, small_vit

LABELS = torch.tensor([0, 1, 2, 0])


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def cosine(a, b):
    return float(F.cosine_similarity(a, b, 0))


@pytest.mark.parametrize("make, size", [(small_vit, 32), (small_convnext, 64)])
def test_they_are_those_of_gradients_taken_by_hand(make, size):
    """Two grid masks in turn; their mean; and the network is plain again afterwards."""
    model, x = make(), images(size, batch=4)
    found = similarities(model, x, LABELS, {"grid": {}, "all": {"keep_ratio": 1.0}}, draws=2, nulls=False)
    assert set(found) == {"grid", "all"}
    assert found["all"]["cosine"] == found["all"]["norm_ratio"] == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="not patched"):
        sbp.remove(model)

    loss = lambda: F.cross_entropy(model(x), LABELS)  # noqa: E731
    exact = flat(torch.autograd.grad(loss(), list(model.parameters())))
    sbp.apply(model)
    kept = [flat(torch.autograd.grad(loss(), list(model.parameters()))) for _ in range(2)]
    assert found["grid"]["cosine"] == pytest.approx(sum(cosine(one, exact) for one in kept) / 2, abs=1e-12)
    assert found["grid"]["cosine_of_mean"] == pytest.approx(cosine(kept[0] + kept[1], exact), abs=1e-12)
    ratio = sum(float(one.norm() / exact.norm()) for one in kept) / 2
    assert found["grid"]["norm_ratio"] == pytest.approx(ratio, abs=1e-12)
    assert found["grid"]["per_layer"].keys() == found["grid"]["norm_ratio_per_layer"].keys()


def test_the_nulls_are_parts_of_the_batch():
    model, x = small_vit(), images(batch=4)
    found = similarities(model, x, LABELS, {}, draws=6)
    assert set(found) == set(SHARES)
    pairs = [(i, j) for i in range(4) for j in range(i)]

    def gradient(part):
        return flat(torch.autograd.grad(F.cross_entropy(model(x[part]), LABELS[part]), list(model.parameters())))

    exact = gradient(slice(None))
    possible = [cosine(gradient(list(pair)), exact) for pair in pairs]
    assert min(possible) <= found["half"]["cosine"] <= max(possible)
    assert found["half"]["cosine"] < found["three_quarters"]["cosine"] < 1


def test_the_same_question_has_the_same_answer():
    """Also with drop path, whose random numbers are the same with SBP and without."""
    x = images(batch=4)
    model = small_vit(drop_path_rate=0.3)
    first, second = (similarities(model, x, LABELS, {"grid": {}}, draws=1) for _ in range(2))
    assert first == second
    exact = similarities(model, x, LABELS, {"all": {"keep_ratio": 1.0}}, draws=1, nulls=False)
    assert exact["all"]["cosine"] == pytest.approx(1, abs=1e-12)

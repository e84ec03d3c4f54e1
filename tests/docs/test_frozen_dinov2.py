"""The page of the frozen DINOv2 shows what was recorded, and subsets of heads are those of masking."""

import json
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.models import TimmClassifier, timm_last_block
from tools.docs import frozen_dinov2
from tools.docs.support import between

pytest.importorskip("timm")


@pytest.fixture(scope="module")
def model() -> TimmClassifier:
    torch.manual_seed(0)
    model = TimmClassifier("vit_tiny_patch16_224", (32, 32), 2, 32).eval()
    torch.nn.init.normal_(model.model.get_classifier().weight)
    return model


@pytest.fixture(scope="module")
def splits(model):
    """Images as bytes, and the same as tokens."""
    generator = torch.Generator().manual_seed(1)
    images, tokens = {}, {}
    for split in frozen_dinov2.SPLITS:
        x = torch.randint(256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.randint(2, (40,), generator=generator)
        images[split] = x.float() / 255, labels
        with torch.no_grad():
            found = timm_last_block.tokens(model.model, model.prepare(x.float() / 255))
        tokens[split] = Split(images=found, labels=labels, groups=labels)
    return images, tokens


class Split(SimpleNamespace):
    def __len__(self):
        return len(self.labels)


def test_subsets_are_chosen_as_masking_them_would(model, splits):
    images, tokens = splits
    part = timm_last_block.without_trunk(model.model).eval()
    found = frozen_dinov2.of_training(part, tokens)
    accuracy = {}
    for size in (3, 2, 1):
        for kept in combinations(range(3), size):
            with torch.no_grad(), dvf.keep_heads(model, {-1: kept}):
                for split, (x, labels) in images.items():
                    hit = model(x).argmax(-1) == labels
                    accuracy[kept, split] = round(hit.double().mean().item(), 4)
    choices = {kept for kept, _ in accuracy}
    assert len(choices) == 7
    single = [kept for kept in choices if len(kept) == 1]
    for pick, among, by in (
        ("single", single, "val_ood"),
        ("subset", choices, "val_ood"),
        ("oracle", choices, "test_ood"),
    ):
        heads = tuple(found[pick]["heads"])
        assert heads in among
        assert accuracy[heads, by] == max(accuracy[kept, by] for kept in among)
    assert found["all"]["heads"] == [0, 1, 2]
    for choice in found.values():
        for split in frozen_dinov2.SPLITS:
            assert choice[split] == accuracy[tuple(choice["heads"]), split]


def test_weights_of_the_part_are_found_in_a_file_of_the_whole(model, tmp_path):
    model.save(tmp_path / "x.safetensors")
    part = timm_last_block.without_trunk(model.model)
    wanted = {name: x.clone() for name, x in part.state_dict().items()}
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
    frozen_dinov2.load_part(part, model.model, tmp_path / "x.safetensors")
    assert all(torch.equal(x, wanted[name]) for name, x in part.state_dict().items())


@pytest.mark.parametrize("name", frozen_dinov2.PAGES.values())
def test_the_page_shows_what_was_recorded(name):
    page = (frozen_dinov2.SCIENCE / f"{name}.md").read_text("utf-8")
    result = json.loads(frozen_dinov2.result_file(name).read_text("utf-8"))
    assert frozen_dinov2.PAGES[result["settings"]["data"]] == name
    for marker, lines in frozen_dinov2.tables(result).items():
        assert page.count(f"<!-- {marker}:begin -->") == page.count(f"<!-- {marker}:end -->") == 1
        assert lines
        assert between(page, marker, lines) == page

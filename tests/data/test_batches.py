import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from wsss_hf.data.batches import batches_by_size
from wsss_hf.data.tagged import DataError, tagged_features


def processor(images, return_tensors):
    assert return_tensors == "pt"
    return {"pixel_values": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])}


def dataset(pictures, tags=None, mask=False):
    count = len(pictures)
    columns = {"image_id": [f"x{i}" for i in range(count)], "image": pictures, "tags": tags or [[0]] * count}
    columns |= {"mask": [{"bytes": b"poison", "path": None}] * count} if mask else {}
    return Dataset.from_dict(columns, features=tagged_features(["cat", "cow", "dog"], *(["mask"] if mask else [])))


def picture(index, size):
    return Image.new("RGB", size, (index, 0, 0))


SIZES = [(8, 6), (6, 8), (8, 6), (8, 6), (1, 1), (6, 8), (8, 6), (8, 6), (8, 6)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_every_row_comes_once_among_images_of_its_size(batch_size):
    tags = [[i % 3, (i + 1) % 3][: i % 3] for i in range(len(SIZES))]
    rows = dataset([picture(i, size) for i, size in enumerate(SIZES)], tags)
    batches = list(batches_by_size(rows, processor, batch_size))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(SIZES)))
    for batch in batches:
        count = len(batch.indices)
        assert count == len(batch.images) <= batch_size
        assert batch.pixel_values.shape == (count, 3, *batch.size) and batch.tags.shape == (count, 3)
        for i, index in enumerate(batch.indices):
            assert batch.size == SIZES[index][::-1] and batch.pixel_values[i, 0, 0, 0] == index
            assert batch.images[i].getpixel((0, 0)) == (index, 0, 0)
            assert batch.tags[i].nonzero().flatten().tolist() == sorted(tags[index])


def test_images_of_one_size_fill_batches():
    rows = dataset([picture(i, size) for i, size in enumerate(SIZES)])
    batches = list(batches_by_size(rows, processor, 3))
    assert sorted(len(batch.indices) for batch in batches) == [1, 2, 3, 3]


def test_few_images_are_open_at_a_time():
    rows = dataset([picture(i, (4, 4)) for i in range(40)])
    first = next(batches_by_size(rows, processor, 2))
    assert max(first.indices) < 16  # a window of eight batches, whatever the data set's size
    mixed = dataset([picture(i, (4 + i, 4 + i)) for i in range(40)])
    assert [batch.indices for batch in batches_by_size(mixed, processor, 2)] == [[i] for i in range(40)]


def test_masks_are_not_read():
    (batch,) = batches_by_size(dataset([picture(0, (4, 4))], mask=True), processor, 2)
    assert batch.indices == [0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"bytes": b"no image", "path": None}, "row 'x1': expected an image, got a file that can't be decoded"),
        (None, "row 'x1': expected an image, got none"),
    ],
)
def test_a_bad_image_is_named(broken, message):
    rows = dataset([picture(0, (4, 4)), broken])
    with pytest.raises(DataError, match=message):
        list(batches_by_size(rows, processor, 2))

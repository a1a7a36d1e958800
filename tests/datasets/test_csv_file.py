import pytest

from cra_jax.datasets import sources
from tests.helpers.dataset_folders import csv_tree, labels, names


def test_csv_with_splits_and_boxes_is_read(tmp_path):
    file = csv_tree(
        tmp_path,
        "Path, label ,split,x_min,y_min,x_max,y_max,photographer\n"
        "photos/2.png,Wren,train,10,5,60,25,A\n"
        "\n"
        '"photos/1.png","Tit, great",TRAIN,,,,,B\n'
        "./photos/3.png,Wren,test,0,0,100,50,\n"
        "photos\\4.png,Wren,val,,,,,\n",
    )
    dataset = sources.load("csv", file, test_share=0.3)
    assert dataset.name == "csv"
    assert dataset.root == tmp_path
    assert dataset.class_names == ("Tit, great", "Wren")
    assert names(dataset, "train") == [
        "photos/2.png",
        "photos/1.png",
    ]  # CSV's order
    assert labels(dataset, "train") == [1, 0]
    assert names(dataset, "test") == ["photos/3.png"]
    assert names(dataset, "val") == ["photos/4.png"]
    assert dataset.splits["train"][0].box == pytest.approx((0.1, 0.1, 0.6, 0.5))
    assert dataset.splits["train"][1].box is None
    assert dataset.splits["train"][0].read(25).shape == (25, 50, 3)
    assert dataset.notes == (
        f"columns of {file} that are ignored: photographer",
        "'test' has no images of 1 of the 2 classes, which its scores leave out:"
        " Tit, great",
        "'val' has no images of 1 of the 2 classes, which its scores leave out:"
        " Tit, great",
    )


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_of_spreadsheets_is_read(separator, encoding, tmp_path):
    text = "label,split,path\r\n2,train,photos/1.png\r\n10,train,photos/2.png\r\n"
    text += "02,validation,photos/3.png\r\n"
    text = text.replace(",", separator)
    dataset = sources.load("csv", csv_tree(tmp_path, text, encoding=encoding))
    assert dataset.class_names == ("2", "10")
    assert labels(dataset, "train") == [0, 1]
    assert labels(dataset, "test") == [0]  # 02 equals 2
    assert names(dataset, "test") == ["photos/3.png"]


def test_csv_without_splits_draws_a_test_split(tmp_path):
    text = "path,label\n" + "".join(f"photos/{i}.png,{i % 2}\n" for i in range(1, 9))
    file = csv_tree(tmp_path, text)
    dataset = sources.load("csv", file, seed=1, test_share=0.5)
    assert len(dataset.splits["test"]) == 4
    assert sum(labels(dataset, "test")) == 2
    assert "4 of 8 images were drawn for testing" in dataset.notes[0]
    for split in ("train", "test"):
        assert names(dataset, split) == sorted(names(dataset, split))
    again = sources.load("csv", file, seed=1, test_share=0.5)
    assert names(again, "test") == names(dataset, "test")
    others = [sources.load("csv", file, seed=s, test_share=0.5) for s in (2, 3, 4)]
    assert any(names(other, "test") != names(dataset, "test") for other in others)


def test_numbers_that_pandas_made_fractions_are_one_class(tmp_path):
    text = "path,label\n" + "".join(
        f"photos/{i}.png,{label}\n"
        for i, label in enumerate(("1.0", "2", "01", 2.0), 1)
    )
    dataset = sources.load("csv", csv_tree(tmp_path, text))
    assert dataset.class_names == ("1", "2")


def test_val_alone_is_the_test_split_and_a_note_says_so(tmp_path):
    text = f"path,label,split\n{ROW}photos/2.png,b,train\nphotos/3.png,a,validation\n"
    dataset = sources.load("csv", csv_tree(tmp_path, text))
    assert names(dataset, "test") == ["photos/3.png"]
    assert "has no test split: its validation split is used" in dataset.notes[0]


ROW = "photos/1.png,a,train\n"


WRONG_TEXTS = {
    "empty file": ("", r"header \[\] lacks path, label; expected"),
    "no rows": ("path,label\n\n", "there are no rows after the header"),
    "no header": (ROW, r"header .*1\.png.* lacks path, label"),
    "half a box": ("path,label,x_min,y_min\n", "lacks x_max, y_max"),
    "doubled column": ("path,label,Label\n", "repeats label"),
    "short row": (f"path,label,split\n{ROW}photos/2.png,b\n", "line 3: 2 values, but"),
    "after lines in quotes": ('path,label\nphotos/1.png,"a\nb"\nx\n', "line 4: 1 val"),
    "open quotes": ('path,label\nphotos/1.png,"a\n', "after line .*: unexpected end"),
    "no path": ("path,label\n,a\n", "line 2: the path is ''"),
    "upwards": (
        "path,label\nphotos/../../1.png,a\n",
        "line 2: .* is outside the CSV's",
    ),
    "absolute": ("path,label\n/photos/1.png,a\n", "line 2: .* is outside the CSV's"),
    "drive": ("path,label\nC:\\photos\\1.png,a\n", "line 2: .* is outside the CSV's"),
    "no label": ("path,label\nphotos/1.png, \n", "line 2: the label is empty"),
    "odd split": (
        f"path,label,split\n{ROW}photos/2.png,b,dev\n",
        "line 3: the split is 'dev'; use",
    ),
    "no split": (
        f"path,label,split\n{ROW}photos/2.png,b,\n",
        "line 3: the split is ''; use",
    ),
    "twice": (
        "path,label\nphotos/1.png,a\n./photos/1.png,b\n",
        "line 3: './photos/1.png' is also on line 2",
    ),
    "missing": (
        "path,label\nphotos/1.png,a\nphotos/9.png,b\nphotos,c\n",
        r"2 of 3 images do not exist: .*photos/9\.png, line 4: photos; give paths",
    ),
    "one class": ("path,label\nphotos/1.png,a\nphotos/2.png,a\n", "only the class a"),
    "no training": (
        "path,label,split\nphotos/1.png,a,test\nphotos/2.png,b,test\n",
        "only test is here, and no training split; expected a CSV",
    ),
    "other case": (
        "path,label\nphotos/1.png,Wren\nphotos/2.png,wren\n",
        r"list\.csv: the classes 'Wren' and 'wren' differ only in case; write",
    ),
    "missing label": (
        "path,label\nphotos/1.png,nan\n",
        "2: the label is 'nan', which",
    ),
    "missing, of pandas": ("path,label\nphotos/1.png,<NA>\n", "'<NA>', which stands"),
    "missing, of Excel": ("path,label\nphotos/1.png,#N/A\n", "'#N/A', which stands"),
    "long number": (
        f"path,label\nphotos/1.png,{'9' * 5000}\nphotos/2.png,1\n",
        r"line 2: the label has 5,000 characters \(9{20}\.\.\.\); give a class of",
    ),
    "long path": (f"path,label\n{'9' * 5000}.png,a\n", "1 of 1 images do not exist"),
}


@pytest.mark.parametrize("case", WRONG_TEXTS)
def test_wrong_csv_is_an_error(case, tmp_path):
    text, message = WRONG_TEXTS[case]
    with pytest.raises(ValueError, match=message) as caught:
        sources.load("csv", csv_tree(tmp_path, text))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "box",
    [
        "1,2,3,",
        "1,2,3,x",
        "9,2,3,4",
        "1,9,3,4",
        "nan,1,2,3",
        "1,2,3,inf",
        "1,2,inf,4",
        "-inf,2,3,4",
        "1,-inf,3,4",
        "1,2,3,nan",
    ],
)
def test_wrong_boxes_in_csv_are_errors(box, tmp_path):
    text = f"path,label,x_min,y_min,x_max,y_max\nphotos/1.png,a,{box}\n"
    with pytest.raises(ValueError, match=r"line 2: the box is .*x_min < x_max"):
        sources.load("csv", csv_tree(tmp_path, text))


@pytest.mark.parametrize("box", ["0.1,0.1,0.9,0.9", "0,0,1,1", "-1,0,0.5,1"])
def test_boxes_as_fractions_are_errors(box, tmp_path):
    text = f"path,label,x_min,y_min,x_max,y_max\nphotos/1.png,a,{box}\n"
    with pytest.raises(ValueError, match=r"line 2: the box is .*instead of fractions"):
        sources.load("csv", csv_tree(tmp_path, text))


def test_csv_in_another_encoding_is_an_error(tmp_path):
    file = csv_tree(tmp_path, "path,label\nphotos/1.png,épée\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"list\.csv: .*save the file as UTF-8"):
        sources.load("csv", file)

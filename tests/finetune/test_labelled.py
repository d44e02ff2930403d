"""Files of the data sets as pairs: reviews of one source, no text in both parts; sentences."""

from finetune.tiny import WORDS

from fastft.finetune import labelled


def test_reviews(tmp_path):
    rows = [f'"{word}, {word}",{i % 2},rotten_tomatoes' for i, word in enumerate(WORDS[:20])]
    rows += [rows[0], f"{WORDS[0]},1,imdb"]
    file = tmp_path / "reviews.csv"
    file.write_text("\n".join(["text,label,source", *rows]))
    train, held = labelled.read_reviews(file, "rotten_tomatoes", 5)
    assert len(train) == 15 and len(held) == 5
    assert dict(train + held) == {f"{word}, {word}": i % 2 for i, word in enumerate(WORDS[:20])}
    assert labelled.read_reviews(file, "rotten_tomatoes", 5) == (train, held)
    assert labelled.read_reviews(file, "rotten_tomatoes", 5, seed=1) != (train, held)
    assert labelled.read_reviews(file, "imdb", 0) == ([(WORDS[0], 1)], [])


def test_sentences(tmp_path):
    (tmp_path / "a.txt").write_text("-DOCSTART- O\n\nEU NNP B-ORG\nrejects VBZ O\n")
    assert labelled.read_conll(tmp_path / "a.txt") == [(["EU", "rejects"], ["B-ORG", "O"])]

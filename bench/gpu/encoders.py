"""Training steps of BERT-base with random weights, on batches as long as real ones are.

32 rows as the first reviews of two data sets have them in WordPiece tokens, padded to the longest
of the batch, or to the length that tutorials pad to.
"""

import torch
import transformers

from bench.gpu.case import Case, Floor, Here, Report
from bench.gpu.measure import Session
from bench.gpu.steps import Steps, compare

ROTTEN_TOMATOES = (
    28, 60, 9, 20, 10, 44, 11, 49, 22, 21, 25, 16, 18, 45, 36, 27,
    8, 33, 40, 41, 16, 27, 27, 20, 18, 26, 20, 37, 21, 16, 35, 18,
)  # fmt: skip
IMDB = (
    496, 512, 276, 84, 512, 512, 238, 512, 276, 381, 357, 191, 512, 421, 512, 512,
    211, 158, 264, 247, 485, 132, 273, 352, 179, 195, 121, 475, 203, 307, 173, 226,
)  # fmt: skip


def encoder_steps(here: Here, lengths: tuple[int, ...], padded_to: int) -> Steps:
    torch.manual_seed(0)
    toy = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
    config = transformers.BertConfig(num_labels=2, **(toy if here.toy else {}))
    with torch.device(here.device):
        model = transformers.AutoModelForSequenceClassification.from_config(
            config, dtype=here.dtype, attn_implementation="sdpa"
        )
    # Dropout draws other numbers where padding is left out: results could not be compared.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    lengths = torch.tensor(lengths, device=here.device)
    places = torch.arange(padded_to or int(lengths.max()), device=here.device)
    mask = (places < lengths[:, None]).long()
    ids = torch.randint(1, config.vocab_size, mask.shape, device=here.device) * mask
    labels = torch.randint(0, 2, lengths.shape, device=here.device)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    weights = sum(p.numel() for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2)
    attention = 4 * config.hidden_size * config.num_hidden_layers
    operations = 3 * int(2 * weights * lengths.sum() + attention * lengths.square().sum())
    trained = sum(p.numel() for p in model.parameters())
    # AdamW reads weight, gradient and both moments, and writes all but the gradient.
    floor = Floor(7 * trained * here.dtype.itemsize, operations, here.dtype, both=True)
    return Steps(model.train(), batch, floor)


def step(session: Session, lengths: tuple[int, ...], padded_to: int, compiled: bool) -> Report:
    return compare(session, encoder_steps(session.here, lengths, padded_to), compiled)


def cases() -> list[Case]:
    made = []
    for name, lengths, longest in (("Rotten Tomatoes", ROTTEN_TOMATOES, 128), ("IMDB", IMDB, 512)):
        for padded_to in (longest, 0):
            padded = f"padded to {padded_to}" if padded_to else "to the longest"
            work = f"BERT-base, 32 of {name}, {padded}"
            made.append(Case.of(work, step, lengths, padded_to, False))
    compiled = "BERT-base, 32 of IMDB, to the longest, torch.compile"
    made.append(Case.of(compiled, step, IMDB, 0, True, limit=240.0))
    return made

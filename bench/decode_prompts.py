"""Prompts for the decoding benches, and how much of an answer is copied from its prompt.

`python -m bench.decode_prompts [model folder]` decodes REWRITING and OPEN greedily and counts it.
"""

import sys
from collections.abc import Sequence

# Edits, quotations and changes of code: 80 to 300 tokens, most of them a text the answer repeats,
# so that a draft read off the prompt is often right.
REWRITING = [
    """Fix the spelling mistakes in this text. Change nothing else.

The harbour was quiet when the first boats came home. Nets lay in heaps along the wall, and the \
gulls walked betwen them looking for scraps. An old man sat on a crate and mended a hole with a \
wooden needle. He did not look up when the boats touched the stone, becuase he knew every one of \
them by the sound of its engine. Later the fish would be sold in the square, and the children \
would carry ice from the shed to the market stalls. By noon the water was empty agian, and only \
the smell of tar and salt remained.""",
    """Repeat this code with the variable x renamed to count.

```python
def words_longer_than(text, limit):
    x = 0
    for word in text.split():
        if len(word) > limit:
            x = x + 1
    if x == 0:
        print("no word is longer than", limit)
    else:
        print(x, "words are longer than", limit)
    return x
```""",
    """Quote every sentence of this text that mentions the river, word for word.

The river runs through the middle of the town and turns three old mills. In spring the river \
floods the lower gardens and leaves a layer of dark mud. The school stands on the hill beside the \
church. Boys swim in the river from June until the end of August. At night you can hear the river \
from every house. There is a bus to the city twice a day.""",
    """Turn this paragraph into a bulleted list. Keep the words.

Before you leave the cabin, close every window and lock the back door. Turn off the water at the \
main tap under the sink. Empty the fridge and leave its door open. Carry the rubbish down to the \
bins by the road. Sweep the floor and put the ashes in the metal bucket. Fold the blankets and \
put them in the chest under the stairs. Write your name and the date in the guest book. Hang the \
key on the nail behind the woodshed.""",
    """Replace the tabs in this code with four spaces and print it again.

```python
class Stack:
\tdef __init__(self):
\t\tself.items = []

\tdef push(self, item):
\t\tself.items.append(item)

\tdef pop(self):
\t\tif not self.items:
\t\t\traise IndexError("the stack is empty")
\t\treturn self.items.pop()

\tdef peek(self):
\t\treturn self.items[-1]

\tdef size(self):
\t\treturn len(self.items)
```""",
    """Repeat this text with British spelling.

The color of the theater curtain was gray, and its center carried a golden flower. My neighbor \
had organized the whole evening. She apologized for the program, which had been printed on paper \
with a strange odor, and she honored the oldest actor with a small gift. We traveled home late, \
and I realized that I had forgotten my favorite jewelry in the dressing room.""",
    """Correct the grammar of this letter and write it out in full.

Dear Mrs. Alder, thank you for sending me the books about birds. I has read two of them already, \
and my sister are reading the third. The pictures of the owls is very beautiful. Next week we \
goes to the lake, where we hope to see herons and ducks. My father have bought a small boat, and \
he will teach us to row it. I will bring the books back on Sunday, and I will tell you everything \
about our trip. With kind regards, Peter""",
    """Repeat this story, but call the girl Anna instead of Maria.

Maria woke up before the sun. She put on her boots, took the lantern from the shelf and walked to \
the barn. The old horse was waiting at the gate. Maria gave the horse an apple and opened the \
gate. Then they walked slowly down to the river, where the grass was still wet. When the sun came \
over the hill, Maria climbed on the back of the horse and rode home.""",
    """Put each sentence of this text on a line of its own.

The library opens at nine in the morning. Children may borrow four books at a time. Books must be \
returned after three weeks. Please do not eat or drink in the reading room. The computers on the \
second floor are free for everyone. Ask at the desk if you need a password. The library is closed \
on Mondays and on public holidays. Every Saturday a story is read to the youngest children. Lost \
cards cost two euros.""",
    """Write this JSON again with the city changed to Oslo.

```json
{
  "name": "Ingrid Holm",
  "age": 34,
  "city": "Bergen",
  "email": "ingrid@example.org",
  "languages": ["Norwegian", "English", "German"],
  "address": {
    "street": "Harbour Road",
    "number": 12,
    "code": "5003"
  }
}
```""",
]

# About 40 tokens that ask for new text: hardly anything in the prompt helps with the answer.
OPEN = [
    "Explain why the sky is blue during the day and red in the evening. Write for a child of ten "
    "who has never heard of wavelengths, and use one example from daily life.",
    "Write a short story about a clockmaker who finds a clock that runs backwards. It should take "
    "place in a small town in winter and have a surprising but happy end.",
    "Explain why bread rises when it is baked, what the yeast does in the dough, and what goes "
    "wrong when the oven is too cold or when the dough has been left for too long.",
    "I would like to learn to play the guitar, but I have only twenty minutes every evening. "
    "Suggest a plan for the first four weeks and tell me what I should be able to play after it.",
    "Describe a market in a port by the sea early in the morning: what one sees, hears and smells "
    "there, who the people are, and what is being bought and sold at the stalls.",
    "What are the advantages and the disadvantages of living in a large city rather than in a "
    "village? Give at least three of each, and finish with your own recommendation.",
    "Write a poem about an old lighthouse that is no longer needed. It should have three stanzas "
    "of four lines each, and the last line should mention the light of the stars.",
    "Explain how a bicycle stays upright while it is moving and why it falls over when it stands "
    "still. Which forces act on it, and what does the rider do without noticing?",
    "Write a conversation between a gardener and a snail that has eaten all of the salad. Both "
    "should be polite, both should have good arguments, and in the end they should agree.",
    "Why did people begin to farm instead of hunting and gathering? Describe what changed in their "
    "lives, what became easier, what became harder, and how long this took.",
]

# Every kind of prompt, 10 to 100 tokens: what two ways of decoding are compared on.
FIFTY = [
    *OPEN,
    "What is the capital of Australia, and why is it not Sydney?",
    "How many days does February have in a leap year?",
    "List five animals that sleep through the winter, and say where.",
    "Name the planets of the solar system in order, beginning next to the sun.",
    "Give me three ideas for a birthday present for my grandfather.",
    "What is the difference between weather and climate? Answer in two sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Write a SQL query that lists the ten customers with the largest orders of the last year.",
    "What does this line of Python do?\n\nprint(sorted(set(words), key=len)[-3:])",
    "Find the error in this code:\n\n```python\nfor i in range(10)\n    print(i)\n```",
    "Write a JavaScript function that checks whether a string is a palindrome. Add two examples.",
    "Explain what a pointer is in the C programming language.",
    "Write a shell command that counts the lines of all text files in a folder.",
    "What is 17 times 23? Show how you calculate it.",
    "A train leaves at 9:40 and arrives at 13:15. How long is the journey?",
    "I have 3 boxes with 12 eggs each. I use 7 eggs for a cake and break 2. How many are left?",
    "Solve the equation 3x + 7 = 25 and explain every step.",
    "Translate into French: The cat is sleeping on the warm windowsill.",
    "Translate into Spanish: Where can I buy a ticket for the last train to the coast?",
    "Wie heißt die Hauptstadt von Österreich, und an welchem Fluss liegt sie?",
    "Écris une phrase sur la mer et une phrase sur la montagne.",
    "What do the words naïve, café and résumé have in common?",
    "Write a haiku about the first snow of the year.",
    "Begin a ghost story with the sentence: The door at the end of the corridor was open again.",
    "Write an advertisement for an umbrella that never turns inside out.",
    "Write a polite letter to a neighbour whose dog barks at night.",
    "Invent a name and a short description for a new kind of fruit.",
    "Give a recipe for pancakes. The ingredients should come first, then the steps in order.",
    "How do I remove a coffee stain from a white shirt?",
    "My plant has yellow leaves although I water it every day. What could be the reason?",
    "What should I pack for a walk of two days in the mountains in autumn?",
    "Give me five tips for sleeping better, each in one line.",
    "Complete the list with four more words: apple, pear, plum,",
    "Is this sentence positive or negative? The soup was cold, but the waiter was charming.",
    "Which word does not belong: hammer, saw, cloud, screwdriver? Say why.",
    "Sum this up in one sentence: The old bridge was closed in May because rust had been found in "
    "two of its beams. Repairs were to take three weeks, but the company that had won the contract "
    "could not deliver the steel. In August the town gave the work to another company, and the "
    "bridge was opened again at the end of October.",
    'Who is speaking, and what do they want? "Good morning, I ordered a blue coat a month ago, '
    'and yesterday a parcel came with two red hats. I would like to send them back."',
    "Write these dates as year-month-day: 3 March 2021, 14 July 1999, 25 December 2010.",
    "Sort these names by the alphabet: Oliver, Amelia, Noah, Clara, Benjamin, Zoe, Hugo.",
    "Tell me a riddle whose answer is a shadow, and then explain it.",
]


def chat(tokenizer, prompt: str) -> list[int]:
    """The token ids of `prompt` as a user's message, up to where the assistant's answer begins."""
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def copied(prompt: Sequence[int], answer: Sequence[int], n: int = 3) -> int:
    """How many tokens of `answer` lie in some n-gram that `prompt` has too."""
    seen = {tuple(prompt[i : i + n]) for i in range(len(prompt) - n + 1)}
    starts = [i for i in range(len(answer) - n + 1) if tuple(answer[i : i + n]) in seen]
    return len({i + k for i in starts for k in range(n)})


def main(folder: str | None = None, new: int = 128) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastft.finetune import assets

    folder = folder or assets.model("SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, prompts in {"REWRITING": REWRITING, "OPEN": OPEN}.items():
        print(f"{name}: prompt and answer in tokens, and how many of the answer's are copied")
        for prompt in prompts:
            ids = chat(tokenizer, prompt)
            out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new)
            answer = out[0, len(ids) :].tolist()
            count = copied(ids, answer)
            line = prompt.partition("\n")[0][:60]
            print(f"{len(ids):5}{len(answer):5}{count:5} {count / len(answer):5.0%}  {line}")


if __name__ == "__main__":
    main(*sys.argv[1:2])

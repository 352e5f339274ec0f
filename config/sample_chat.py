"""--chat: what one says and what a model answers, in turn, if it was taught to (config/instruct.py).

    python sample.py out/taught --chat                                 until an empty line
    python sample.py out/taught "Who was Ada?" --chat                  one answer
"""
import math

from config import refuse
from sample import drawn_by, open_run, stream, tell


def options(add):
    add('--chat', action='store_true', help='talk to a model that was taught to: to the prompt, or until an '
        'empty line')


def main(args, of_ideas):
    refuse(args.file or args.interactive or args.samples > 1 or args.eval or args.export,
           '--chat answers what is typed, one answer each: leave --file, --interactive, --samples, --eval and '
           '--export away')
    tell(open_run(args.run, args.device, of_ideas), args, chat)


def chat_ids(tokenizer, messages, room=None):
    """The ids of a chat, [{'role', 'content'}...], up to where the assistant answers: BOS, for each message
    its role and its text, and the assistant's role. An answer ends at one of tokenizer.ends.

    room: at most so many ids: what was said first goes first, then the beginning of the last message.
    """
    turns = []
    for message in messages:
        role = message['role']
        refuse(role not in tokenizer.roles, f'a message has the role {role!r}, this model knows '
               f'{", ".join(tokenizer.roles) or "none"}: leave it out')
        turns.append([tokenizer.roles[role], *tokenizer.encode(message['content'])])
    room = math.inf if room is None else room - 2
    while len(turns) > 1 and sum(map(len, turns)) > room:
        del turns[0]
    if turns and len(turns[0]) > room:
        turns[0][1:] = turns[0][len(turns[0]) - room + 1:]
    return [tokenizer.bos, *(i for turn in turns for i in turn), tokenizer.roles['assistant']]


def chat(run, args, generator):
    """Answers a prompt, or what is typed, in turn until an empty line; returns its tokens' number. A quarter
    of the context is kept for an answer."""
    model, tokenizer, messages, made = run.model, run.tokenizer, [], 0
    refuse(not tokenizer.roles, f'{args.run} was not taught to chat, its vocabulary has no roles: continue a '
           f'text with --interactive, or name a run that was taught')
    for text in [args.prompt] if args.prompt else iter(lambda: input('> '), ''):
        messages.append(dict(role='user', content=text))
        ids, pieces = chat_ids(tokenizer, messages, model.config.block_size * 3 // 4), []
        for piece in stream(model, tokenizer, ids, args.max_new_tokens, generator=generator, **drawn_by(args)):
            print(piece, end='', flush=True)
            pieces.append(piece)
        print()
        messages.append(dict(role='assistant', content=''.join(pieces)))
        made += len(pieces) - 1                  # the last is no token
    return made

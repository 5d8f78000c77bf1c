"""A structured-output backend: ``--structured-output-backend structured_output_example:OneOf``."""

from tokenizers import Tokenizer

from quire.sdk import CompiledGrammar, GrammarState, InvalidRequestError, StructuredOutputBackend


class OneOf(StructuredOutputBackend):
    """Answers one of the texts of ``choice``, each in the tokens that the tokenizer makes of it."""

    @classmethod
    def validate_params(cls, params):
        if params.choice is None:
            raise InvalidRequestError(f"{params.kind} is not supported: this backend knows choices alone")

    def compile(self, params):
        self.validate_params(params)
        tokenizer, [eos, *_] = Tokenizer.from_str(self.tokenizer.tokenizer_json), self.tokenizer.eos_token_ids
        return Answers([[*tokenizer.encode(text, add_special_tokens=False).ids, eos] for text in params.choice])


class Answers(CompiledGrammar):
    def __init__(self, answers):
        self.answers = answers

    def start(self):
        return Answering(self.answers)


class Answering(GrammarState):
    def __init__(self, answers):
        self.answers, self.tokens = answers, []

    def find_next(self):
        count = len(self.tokens)
        return {answer[count] for answer in self.answers if answer[:count] == self.tokens and len(answer) > count}

    def fill_mask(self, mask):
        mask.fill(0)
        for token in self.find_next():
            mask.view("uint32")[token // 32] |= 1 << token % 32

    def advance(self, token_ids):
        for count, token in enumerate(token_ids):
            if token not in self.find_next():
                return count
            self.tokens.append(token)
        return len(token_ids)

    def rollback(self, num_tokens):
        del self.tokens[len(self.tokens) - num_tokens :]

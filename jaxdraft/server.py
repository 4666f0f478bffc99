"""Answers from a model that another process serves: vLLM, SGLang, llama.cpp's server, `transformers serve`.

They share OpenAI's HTTP interface and differ beyond it. vLLM, SGLang and llama.cpp take a prompt as token ids and
report the ids they wrote: prompts then go out as this tokenizer's ids, conversations too, and answers are ids. Others
get text, conversations as messages, and their text is encoded behind the prompt.
"""

import dataclasses
import functools
import itertools
import os
import queue
import random
import re
import threading
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

from jaxdraft.data.conversations import labelled
from jaxdraft.data.prompts import Prompt
from jaxdraft.errors import ConfigError
from jaxdraft.redaction import names_secret, redacted
from jaxdraft.tokenizers import ChatTemplateError, Tokenizer

T = TypeVar("T")

_RETRIED = {408, 425, 429}  # and every 5xx
_REFUSED = {400, 413, 422}  # this request; the next may do
_LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
_CONNECT = 10.0  # seconds
_SHOWN = 300  # characters of what a server answered
_OURS = {"model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stream", "n", "stop"}

# What servers that take ids are asked besides: to sample by temperature and top-p alone (vLLM and SGLang would follow
# the model's generation_config.json, llama.cpp defaults of its own), and to report the ids they wrote.
_WITH_IDS = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "return_token_ids": True,  # vLLM and SGLang: choices[0].token_ids
    "return_tokens": True,  # llama.cpp: __verbose.tokens
    "verbose": True,
}


@dataclasses.dataclass(frozen=True)
class Server:
    """An OpenAI-compatible endpoint.

    What it samples at temperatures above 0 is its own affair: the seed is sent, and equal answers are not promised.
    `transformers serve` samples only where the model's generation_config.json says ``do_sample``. It reports no ids
    either, and a SentencePiece tokenizer cannot always tell them from text: to prompts without messages it may then
    give many errors.

    Attributes:
      url: up to and with the version, as in ``http://localhost:8000/v1``.
      model: the name under which it serves the model; None for the only one it lists.
      concurrency: requests under way at once, of each process of a run.
      retries: of a request that got no answer, or one that says to try again; from 1 s on the wait doubles.
      timeout: seconds for one answer.
      key_variable: the environment variable that holds the API key, where it needs one.
      extra: further fields of every request, e.g. ``{"top_k": 50}``.
    """

    url: str
    model: str | None = None
    concurrency: int = dataclasses.field(default=16, compare=False)  # this and the next change no answer
    retries: int = dataclasses.field(default=6, compare=False)
    timeout: float = dataclasses.field(default=600.0, compare=False)
    key_variable: str = dataclasses.field(default="OPENAI_API_KEY", compare=False)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"url is {redacted(self.url)!r}: give it as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                f"url of {parts.hostname} holds a user name or password: it would be written into the run's files; "
                "put the key into the environment variable that key_variable names"
            )
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0:
            raise ConfigError(f"{self.url}: concurrency and timeout must be positive, retries at least 0")
        if secret := [name for name in self.extra if names_secret(name)]:
            raise ConfigError(
                f"{self.url}: extra holds {secret[0]!r}, which would be written into the run's files: put the key into "
                f"the environment variable that key_variable names"
            )
        if taken := sorted(_OURS & self.extra.keys()):
            raise ConfigError(f"{self.url}: extra holds {taken[0]!r}, which is set for every question")


class Question(NamedTuple):
    """One answer that is wanted.

    Attributes:
      key: comes back with the reply.
      seed: of this answer, 0 ≤ seed < 2³¹.
    """

    key: Any
    prompt: Prompt
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


class Reply(NamedTuple):
    """What came back.

    Attributes:
      key: the question's.
      tokens: ids written after the prompt, the end token among them; empty with an error.
      text: what they add to the prompt's text.
      finish: "eos" where the model ended its answer, "length" where it was cut.
      error: why there is no answer, in words that are the same for every such question; None where there is one.
    """

    key: Any
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish: str | None = None
    error: str | None = None


def ask(
    server: Server, questions: Iterable[Question], tokenizer: Tokenizer, eos_ids: Collection[int]
) -> Iterator[Reply]:
    """Replies in the order in which they come; questions are pulled as requests become free.

    Args:
      eos_ids: the ids at which the served model stops.
    Raises:
      ConfigError: the server refuses the key or does not know the model or the address, at once.
      OSError: it could not be reached or gave no answer, and the retries are used up. Every reply before is sound.
    """
    pending = iter(questions)
    waiting: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()

    def work() -> None:
        while (question := waiting.get()) is not None:
            try:
                done.put(client.reply(question))
            except Exception as error:
                done.put(error)

    under_way = 0
    client = _Client(server, tokenizer, eos_ids)
    try:
        for question in itertools.islice(pending, server.concurrency):
            if not under_way:
                client.probe(question.prompt)
            # A daemon: one that waits for a server that hangs does not keep a stopped run alive.
            threading.Thread(target=work, daemon=True).start()
            waiting.put(question)
            under_way += 1
        while under_way:
            reply = done.get()
            if isinstance(reply, Exception):
                raise reply
            under_way -= 1
            yield reply
            for question in itertools.islice(pending, 1):
                waiting.put(question)
                under_way += 1
    finally:
        client.close()
        for _ in range(server.concurrency):
            waiting.put(None)


def _parts(answer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice, with the ids written where the server reports them, and the usage."""
    reported = answer.get("__verbose", {}).get("tokens")
    return {"token_ids": reported, **answer["choices"][0]}, answer.get("usage") or {}


class _Client:
    """One server's connections, and what is known of it. Its methods may be called from several threads."""

    def __init__(self, server: Server, tokenizer: Tokenizer, eos_ids: Collection[int]):
        import httpx2

        key = os.environ.get(server.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"the environment variable {server.key_variable} holds no key: it has characters no key has"
            )
        self._key = key
        self._server = server
        self._model = server.model
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._takes_ids = False
        self._closed = threading.Event()
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(server.timeout, connect=min(server.timeout, _CONNECT)),
            limits=httpx2.Limits(max_connections=server.concurrency),
            follow_redirects=False,  # the key is for this host
        )

    def close(self) -> None:
        self._closed.set()
        self._http.close()

    def probe(self, prompt: Prompt) -> None:
        """Finds out the model's name and whether the server takes ids.

        Raises:
          ConfigError, OSError: as ``ask``.
        """
        if self._model is None:
            models = self._content(self._send("models"), lambda answer: [model["id"] for model in answer["data"]])
            if len(models) != 1:
                raise ConfigError(f"{self._server.url} serves {', '.join(models) or 'no model'}: name one with model=")
            self._model = models[0]
        few = list(prompt.tokens[:8])
        body = {"model": self._model, "prompt": few, "max_tokens": 1, "temperature": 0.0, **_WITH_IDS}
        response = self._send("completions", body | self._server.extra)
        if response.status_code in (401, 403):
            self._stop(response)
        if response.status_code == 200:
            self._takes_ids = self._content(response, lambda answer: answer["usage"]["prompt_tokens"]) == len(few)

    def reply(self, question: Question) -> Reply:
        """The answer to a question, or why the server refuses it.

        Raises:
          ConfigError, OSError: as ``ask``.
        """
        path, body = self._request(question)
        response = self._send(path, body, question.seed)
        if response.status_code in _REFUSED:
            return Reply(question.key, error=re.sub(r"\d+", "N", f"the server refuses it: {self._said(response)}"))
        choice, usage = self._content(response, _parts)
        try:
            return self._read(question, choice, usage)
        except ChatTemplateError as error:
            return Reply(question.key, error=str(error))

    def _request(self, question: Question) -> tuple[str, dict[str, Any]]:
        """Path and body of the request for an answer."""
        prompt = question.prompt
        path = "completions"
        given: dict[str, Any] = {"prompt": prompt.text}
        if self._takes_ids:
            given = {"prompt": list(prompt.tokens), **_WITH_IDS}
        elif prompt.messages is not None:
            path, given = "chat/completions", {"messages": [dict(message) for message in prompt.messages]}
        return path, {
            "model": self._model,
            "max_tokens": question.max_new_tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "seed": question.seed,
            **given,
            **self._server.extra,
        }

    def _read(self, question: Question, choice: dict[str, Any], usage: dict[str, Any]) -> Reply:
        key, prompt = question.key, question.prompt
        message, finish = choice.get("message") or {}, choice.get("finish_reason")
        if usage.get("prompt_tokens") not in (None, len(prompt.tokens)):
            return Reply(key, error="the server makes other tokens of the prompt than the target's tokenizer")
        if message.get("reasoning_content") or message.get("reasoning") or message.get("tool_calls"):
            return Reply(key, error="the server takes the answer apart: serve without parsers of reasoning and tools")
        if finish not in ("stop", "length"):
            return Reply(key, error=f"the server ended the answer with {finish!r}")
        tokens = choice.get("token_ids")
        if not tokens:
            written = (usage.get("completion_tokens") or 0) - (finish == "stop")
            tokens = self._encoded(prompt, choice.get("text") or message.get("content") or "", written)
        if tokens is None:
            return Reply(key, error="the server reports no token ids, and the answer's text does not tell them")
        if not all(type(token) is int and 0 <= token < self._tokenizer.vocab_size for token in tokens):
            return Reply(key, error="the server writes token ids that the target's tokenizer does not have")
        if finish == "stop" and self._eos_ids.isdisjoint(tokens[-1:]):
            tokens = [*tokens, self._end_of(prompt)]
        text = self._tokenizer.continuation(prompt.tokens, tokens)
        if not text.strip():
            return Reply(key, error="empty answer")
        return Reply(key, tuple(tokens), text, "eos" if tokens[-1] in self._eos_ids else "length")

    def _encoded(self, prompt: Prompt, text: str, written: int) -> list[int] | None:
        """Ids of an answer's text without its end token; None where the text does not tell them.

        A server that decodes an answer by itself loses the space that a SentencePiece begins with: ``written``, how
        many ids there were, says whether it did. Where it may have or not, the text is taken as it is behind white
        space and in a conversation, where the chat template says how an answer follows, and else nothing is guessed.
        """
        texts = [text, f" {text}"] if self._loses_space and not text[:1].isspace() else [text]
        found = [self._behind(prompt, text) for text in texts]
        fits = [tokens for tokens in found if tokens is None or len(tokens) == written]
        if prompt.messages is not None or prompt.text[-1:].isspace() or len(texts) == 1:
            return next((tokens for tokens in [*fits, *found] if tokens is not None), None)
        return fits[0] if len(fits) == 1 else None

    def _behind(self, prompt: Prompt, text: str) -> list[int] | None:
        """Ids of a text as it stands behind the prompt; None where the prompt's last token would be another."""
        if prompt.messages is None:
            tokens = self._tokenizer.encode(prompt.text + text)
        else:
            turns = [*prompt.messages, {"role": "assistant", "content": text}]
            tokens, mask = labelled(self._tokenizer, turns, eos_ids=self._eos_ids)
            del tokens[max(place for place, is_label in enumerate(mask) if is_label) :]  # from the end token on
        before = len(prompt.tokens)
        return tokens[before:] if tuple(tokens[:before]) == prompt.tokens else None

    @functools.cached_property
    def _loses_space(self) -> bool:
        """Whether a word has the same ids where a text begins as after a space."""
        one, two = self._tokenizer.encode_batch(["a", "a a"], bos=False)
        return two == [*one, *one]

    def _end_of(self, prompt: Prompt) -> int:
        if prompt.messages is not None:
            return self._end_of_turn
        named = self._tokenizer.eos_id
        return named if named is not None and named in self._eos_ids else min(self._eos_ids)

    @functools.cached_property
    def _end_of_turn(self) -> int:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tokens, mask = labelled(self._tokenizer, turns, eos_ids=self._eos_ids)
        return [token for token, is_label in zip(tokens, mask, strict=True) if is_label][-1]

    def _send(self, path: str, body: dict[str, Any] | None = None, seed: int = 0) -> Any:
        """The response, with a body by POST, once it is none that asks to try again."""
        import httpx2

        server = self._server
        for attempt in itertools.count():
            wait = 0.0
            try:
                response = self._http.request(
                    "GET" if body is None else "POST", f"{server.url.rstrip('/')}/{path}", json=body
                )
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code not in _RETRIED and response.status_code < 500:
                    return response
                problem = f"{response.status_code}: {self._said(response)}"
                after = response.headers.get("retry-after", "")
                wait = float(after) if after.isdecimal() else 0.0
            if attempt == server.retries or self._closed.is_set():
                break
            backoff = min(2.0**attempt, _LONGEST_WAIT) * random.Random(f"{seed}/{attempt}").uniform(0.5, 1.0)
            self._closed.wait(max(backoff, wait))
        raise OSError(
            f"{server.url}: no answer in {attempt + 1} tries, the last time {problem}. What it has answered is kept: "
            "see to the server, then run the same command again"
        )

    def _content(self, response: Any, read: Callable[[Any], T]) -> T:
        """What ``read`` makes of the JSON that came with status 200."""
        if response.status_code != 200:
            self._stop(response)
        try:
            return read(response.json())
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{response.url}: not what an OpenAI-compatible server answers ({error!r}): {self._said(response)}"
            ) from error

    def _stop(self, response: Any) -> NoReturn:
        """ConfigError for a status that every request would get, with the remedy."""
        server, status = self._server, response.status_code
        if status in (401, 403):
            state = "is sent" if self._key else "is not set"
            remedy = f"the key in the environment variable {server.key_variable} {state}"
        elif response.is_redirect:
            remedy = f"it redirects to {response.headers.get('location')}: if that is the server, give its url"
        else:
            remedy = f"see that url is right (most end in /v1), and that it serves the model {self._model!r}"
        raise ConfigError(f"{response.url}: {status}: {self._said(response)}; {remedy}")

    def _said(self, response: Any) -> str:
        """A server's words about an error, without the key."""
        try:
            words = response.json()
        except (RecursionError, ValueError):
            words = response.text
        for name in ("error", "message", "detail"):
            if isinstance(words, dict) and name in words:
                words = words[name]
        words = " ".join(str(words).split())
        return (words.replace(self._key, "(key)") if self._key else words)[:_SHOWN]

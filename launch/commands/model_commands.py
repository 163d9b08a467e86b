"""generate, chat, serve: a trained model at work."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from launch.conversation import Conversation
    from launch.remote_conversation import RemoteConversation
    from moe.checkpoint import LoadedModel

PANEL = "Use a model"
ACCESS, ENGINE, RAY, EXPERTS = "Who may use it", "Engine", "Ray", "Expert parallelism"


def _probability(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value:g} is not more than 0 and at most 1")
    return value


def _seed(value: int | None) -> int | None:
    # Each text after the first counts the seed up; torch takes 64 bits with a sign.
    if value is not None and not 0 <= value < 2**62:
        raise typer.BadParameter(f"{value} is not from 0 to 2**62 - 1")
    return value


Model = Annotated[str, typer.Argument(metavar="RUN|MODEL_DIR", help="A run, or an exported model.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", callback=_probability, help="Keep the likeliest tokens up to this probability, more than 0 to 1."
    ),
]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Keep this many likeliest tokens.")]
Seed = Annotated[int | None, typer.Option("--seed", callback=_seed, help="The same seed gives the same text.")]

CHAT_HELP = "/reset forget the conversation   /stats speed and context   /quit leave   Ctrl-C stop the answer"


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("generate", rich_help_panel=PANEL)(generate)
    app.command("chat", rich_help_panel=PANEL)(chat)
    app.command("serve", rich_help_panel=PANEL)(serve)


def generate(
    path: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin; none begins a text.")] = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = None,
    seed: Seed = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many continuations.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line about speed on stderr.")] = False,
) -> None:
    """Continue a text."""
    from launch.conversation import Speed, stream_text
    from moe.generate import SamplingParams

    text = _read_prompt() if prompt == "-" else prompt
    loaded = _load(path)
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(text) if text else [tokenizer.eos_id]
    speed = Speed()
    for number in range(count):
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=None if seed is None else seed + number,
        )
        if number:
            print("\n---")
        shown = text  # with the first piece: a prompt that does not fit is refused before anything is printed
        for piece in stream_text(loaded, ids, params, (), speed):
            print(shown + piece, end="", flush=True)
            shown = ""
        print(shown, flush=True)
    if not quiet:
        print(f"[{speed.tokens} tokens, {speed.tokens_per_s:,.0f} tokens/s]", file=sys.stderr)


def _read_prompt() -> str:
    from moe.errors import DataError

    try:
        text = sys.stdin.read()
        text.encode()  # in some locales a byte that is no text arrives as half a character
    except UnicodeError as error:
        raise DataError("the prompt on stdin is not UTF-8 text") from error
    return text


def chat(
    path: Annotated[str, typer.Argument(metavar="RUN|MODEL_DIR|URL", help="A run, an exported model, or a server.")],
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = None,
    seed: Seed = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="MOEYARD_API_KEY", help="Key of the server, if it asks for one.")
    ] = None,
) -> None:
    """Talk with a model in the terminal: one on this machine's disk, or one behind a server's URL."""
    from launch.conversation import Conversation
    from launch.remote_conversation import RemoteConversation
    from moe.generate import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    conversation: Conversation | RemoteConversation
    if path.startswith(("http://", "https://")):
        conversation = RemoteConversation(path, params, system, api_key)
        print(f"{conversation.model} at {path}")
    else:
        loaded = _load(path)
        conversation = Conversation(loaded, params, system)
        if loaded.tokenizer.chat_template is None:
            print("This model has no chat template: it continues a dialogue and may not behave like an assistant.")
    print(CHAT_HELP)
    while _one_turn(conversation):
        pass


def _one_turn(conversation: Conversation | RemoteConversation) -> bool:
    """Read a line and answer it; False when the user leaves."""
    from moe.errors import UserError

    try:
        line = input("\nyou> ").strip()
        line.encode()  # in some locales a byte that is no text arrives as half a character
    except EOFError:
        print()
        return False
    except KeyboardInterrupt:
        print("\n(/quit leaves)")
        return True
    except UnicodeError:
        print("error: that line is not UTF-8 text")
        return True
    if not line:
        return True
    if line.startswith("/"):
        return _command(line, conversation)
    answer = conversation.answer(line)
    try:
        print("model> ", end="", flush=True)
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except UserError as error:
        print(f"\nerror: {error}")
    finally:
        answer.close()
    if conversation.forgotten:
        print(f"(the first {conversation.forgotten} messages no longer fit into the context)")
    return True


def _command(line: str, conversation: Conversation | RemoteConversation) -> bool:
    if line in ("/quit", "/exit"):
        return False
    if line == "/reset":
        conversation.reset()
        print("(forgotten)")
    elif line == "/stats":
        speed = conversation.speed
        prompt = f"last prompt {speed.prompt_tokens:,} of {conversation.context:,} tokens"
        answers = f"{speed.tokens:,} tokens at {speed.tokens_per_s:,.0f}/s"
        print(f"{conversation.turns} messages; {prompt}, first token after {speed.first_token_s:.2f} s; {answers}")
    else:
        print(f"(no command {line}) {CHAT_HELP}")
    return True


def serve(
    path: Model,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes any free port.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="Model name in requests; the run's unless given.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="MOEYARD_API_KEYS",
            help="Accepted key; repeat for more, or separate them by spaces in the variable. None: no key needed.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="More accepted keys, one a line.", rich_help_panel=ACCESS)
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            "--admin-key",
            envvar="MOEYARD_ADMIN_KEY",
            help="Opens /admin/: other weights, expert records, cache reset. None: closed.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    max_sequences: Annotated[
        int, typer.Option("--max-sequences", min=1, help="Sequences computed at once.", rich_help_panel=ENGINE)
    ] = 32,
    max_step_tokens: Annotated[
        int,
        typer.Option(
            "--max-step-tokens",
            min=1,
            help="Positions of one forward pass; longer prompts are cut into pieces.",
            rich_help_panel=ENGINE,
        ),
    ] = 512,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=0, help="Waiting requests; more get 429.", rich_help_panel=ENGINE)
    ] = 64,
    max_queue_tokens: Annotated[
        int,
        typer.Option(
            "--max-queue-tokens", min=1, help="Prompt tokens that may wait; more get 429.", rich_help_panel=ENGINE
        ),
    ] = 262_144,
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            "--kv-cache-gib",
            help="Memory for keys and values; some full contexts unless given.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep computed prompts for requests that begin alike.", rich_help_panel=ENGINE)
    ] = True,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="The same seed gives the same text whatever else is computed; slower.",
            rich_help_panel=ENGINE,
        ),
    ] = False,
    native: Annotated[
        bool | None,
        typer.Option(
            "--native/--no-native",
            help="Compute with the C++ ops of csrc; unless given: where they are built or can be.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (as stored), fp32 or bf16.", rich_help_panel=ENGINE)
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...", rich_help_panel=ENGINE)] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, help="Compute threads; all cores but one unless given.", rich_help_panel=ENGINE
        ),
    ] = None,
    drain_s: Annotated[
        float, typer.Option("--drain", min=0, help="Seconds for running requests after a signal.")
    ] = 30.0,
    request_timeout_s: Annotated[
        float | None, typer.Option("--request-timeout", help="Seconds that an answer may take in all; none: no limit.")
    ] = None,
    access_log: Annotated[bool, typer.Option(help="One line per request on stderr.")] = True,
    log_json: Annotated[bool, typer.Option("--log-json", help="Those lines as JSON objects.")] = False,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="On Ray Serve; starts a local Ray unless RAY_ADDRESS is set.", rich_help_panel=RAY),
    ] = False,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="A: every replica answers HTTP. B: HTTP replicas in front of engine replicas.",
            rich_help_panel=RAY,
        ),
    ] = "A",
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Engines of the model.", rich_help_panel=RAY)] = 1,
    expert_parallel: Annotated[
        int,
        typer.Option(
            "--expert-parallel", min=1, help="Processes that the experts are spread over.", rich_help_panel=EXPERTS
        ),
    ] = 1,
    extra_experts: Annotated[
        int,
        typer.Option(
            "--extra-experts", min=0, help="Copies of hot experts per process and layer.", rich_help_panel=EXPERTS
        ),
    ] = 1,
) -> int:
    """Serve a model over HTTP, with OpenAI's API and a page to chat and watch the experts."""
    from moe.errors import UserError
    from serve.hosts.embedded import require_serve_extra, serve_model

    if layout not in ("A", "B"):
        raise UserError(f"--layout must be A or B, got {layout!r}")
    if ray and expert_parallel > 1:
        raise UserError("--expert-parallel is for one server on one machine: leave out --ray")
    if not ray and (layout != "A" or replicas != 1):
        raise UserError("--layout and --replicas are for Ray: add --ray")
    require_serve_extra()
    from serve.engine.settings import EngineSettings
    from serve.http.settings import ServerSettings

    def start(*args: Any, **kwargs: Any) -> int:
        if expert_parallel > 1:
            from launch.serve_gang import load_gang_engine

            spread = partial(load_gang_engine, world_size=expert_parallel, extra_experts=extra_experts)
            return serve_model(*args, **kwargs, load=spread)
        if not ray:
            return serve_model(*args, **kwargs)
        from serve.hosts.ray_local import serve_with_ray

        return serve_with_ray(*args, **kwargs, layout="A" if layout == "A" else "B", replicas=replicas)

    return start(
        path,
        host=host,
        port=port,
        name=name,
        engine=EngineSettings(
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            max_queue=max_queue,
            max_queue_tokens=max_queue_tokens,
            kv_cache_gib=kv_cache_gib,
            prefix_cache=prefix_cache,
            batch_invariant=batch_invariant,
            native=native,
            threads=threads,
            dtype=dtype,  # type: ignore[arg-type]  # checked there, with the values that are allowed
            device=device,
        ),
        settings=ServerSettings(
            api_keys=(*(api_key or ()), *_keys_in(api_key_file)),
            admin_key=admin_key,
            drain_s=drain_s,
            request_timeout_s=request_timeout_s,
            access_log_format="json" if log_json else "text",
        ),
        access_log=access_log,
    )


def _keys_in(file: Path | None) -> list[str]:
    """Keys of a file, one a line; empty lines and those that begin with # do not count."""
    from moe.errors import UserError

    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"--api-key-file {file}: has no key in it; without keys everybody would be let in")
    return keys


def _load(path: str) -> LoadedModel:
    from launch.run_dir import resolve_model_dir
    from moe.checkpoint import load_model

    return load_model(resolve_model_dir(path))

"""Wait until the server answers, then print two lines to paste: scripts/announce.py PID [FLAGS OF THE SERVER]...

Started in the background by scripts/serve. Prints nothing when the flags are wrong (the server says so itself) or when
process PID ends first.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shlex
import sys
import urllib.error
import urllib.request
from pathlib import Path

from moonlang.base.errors import ConfigError
from moonlang.config.server_args import ServerArgs, parse

PROMPT = "Write a short story about a fox."
MAX_TOKENS = 100
POLL_S = 0.1


def fetch(url: str, api_key: str | None) -> bytes | None:
    """The body behind `url`, or None while nobody answers."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return response.read()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def base_url(args: ServerArgs) -> str:
    """Where a client on this machine reaches the server."""
    host = "127.0.0.1" if args.host in ("0.0.0.0", "::", "localhost") else args.host
    return f"http://[{host}]:{args.port}" if ":" in host else f"http://{host}:{args.port}"


def curl_line(url: str, model: str, api_key: str | None) -> str:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
    words = ["curl", "-s", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if api_key:
        words += ["-H", f"Authorization: Bearer {api_key}"]
    return shlex.join([*words, "-d", json.dumps(body)])


def python_line(url: str, model: str, api_key: str | None) -> str:
    text = json.dumps  # a string in double quotes, so that the shell's single quotes can go around all of it
    code = (
        f"from openai import OpenAI; client = OpenAI(base_url={text(url + '/v1')}, api_key={text(api_key or 'none')}); "
        f"print(client.chat.completions.create(model={text(model)}, max_tokens={MAX_TOKENS}, temperature=0, "
        f'messages=[{{"role": "user", "content": {text(PROMPT)}}}]).choices[0].message.content)'
    )
    return shlex.join([sys.executable, "-c", code])


def main() -> None:
    pid = int(sys.argv[1])
    logging.getLogger("moonlang").addHandler(logging.NullHandler())  # warnings about flags are the server's to print
    try:
        args = parse(sys.argv[2:])
    except ConfigError:
        return
    if args.port == 0 or args.ssl_certfile:
        return  # only the server knows the port; a certificate may be one that this machine does not trust
    url = base_url(args)
    try:
        server = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    while fetch(f"{url}/health", args.api_key) is None:
        ended, _, _ = select.select([server], [], [], POLL_S)
        if ended:
            return
    models = json.loads(fetch(f"{url}/v1/models", args.api_key) or b'{"data": [{"id": "default"}]}')
    model = models["data"][0]["id"]
    print(f"\nMoonLang serves {Path(model).name} at {url}. Try it from another terminal:\n")
    print(curl_line(url, model, args.api_key))
    print()
    print(python_line(url, model, args.api_key), flush=True)


if __name__ == "__main__":
    main()

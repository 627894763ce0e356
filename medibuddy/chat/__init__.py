"""Talking to a tuned model: what is said first in an emergency, sessions, the web page, the behaviour suite."""


def __getattr__(name):
    "Import `Session` on first use, since it needs the model libraries"
    if name != "Session":
        raise AttributeError(f"module 'medibuddy.chat' has no attribute {name!r}")
    from medibuddy.chat.session import Session

    return Session

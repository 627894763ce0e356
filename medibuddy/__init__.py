"""Fine-tune language models on medical text, and prove what the tuning changed."""

__version__ = "0.1.0"

# Importing medibuddy loads neither torch nor any model library: a name is imported when it is first used.
_HOMES = {
    "Recipe": "medibuddy.recipe",
    "Example": "medibuddy.data.example",
    "load_examples": "medibuddy.data.sources",
    "load_model": "medibuddy.models.loaders",
    "prepare": "medibuddy.flow",
    "train": "medibuddy.flow",
    "evaluate": "medibuddy.flow",
    "compare": "medibuddy.flow",
    "report": "medibuddy.flow",
    "demo": "medibuddy.flow",
    "verify": "medibuddy.verification",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    "Import a public name on first use"
    if name == "chat":  # for `medibuddy.chat.Session`
        from importlib import import_module

        return import_module("medibuddy.chat")
    if name not in _HOMES:
        raise AttributeError(f"module 'medibuddy' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return sorted({*globals(), *_HOMES})

"""Parts of the training of ``moonlang-tiny``, the model that is built into MoonLang."""

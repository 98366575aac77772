"""The board as code: `sections` say what is shown, `panels` how it looks, `assemble` puts it together."""

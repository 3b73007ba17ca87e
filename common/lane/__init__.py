"""The lane: one stream that carries many calls. Its two ends, their messages and their pace."""

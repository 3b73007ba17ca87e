"""The lane: one stream that carries many calls. Both ends, their messages, their pace."""

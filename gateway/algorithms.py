"""What a token may be signed by (RFC 7518, RFC 8037)."""

ASYMMETRIC = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
# Whoever can verify such a token can make one.
SYMMETRIC = ("HS256", "HS384", "HS512")

"""The contracts (`*.proto`) and the code that protoc makes of them (`make protos`)."""

"""The chat format: from messages to token ids, where what somebody says never becomes a control token."""

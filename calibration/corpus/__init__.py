"""Text in: files, records, data sets, chats, and the token windows cut from them."""

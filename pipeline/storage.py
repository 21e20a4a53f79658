"""Files where they are: local paths, and objects at s3://, gs:// and az:// URIs."""

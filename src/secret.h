/*
 * secret.h
 *		Files that hold a token or keys.
 */
#ifndef SM_SECRET_H
#define SM_SECRET_H

/* A secret is a few lines of text, not a file of any size. */
#define SM_SECRET_MAX	8192

typedef struct SmSecret
{
	ssize_t		len;
	char		text[SM_SECRET_MAX + 1];
} SmSecret;

/*
 * Reads a file.  Returns what is wrong, beginning with what, or NULL.  The path is no part
 * of it: it ends up in views.  Who has used the text calls sm_secret_forget().
 */
extern const char *sm_secret_read(const char *path, const char *what, SmSecret *secret);
extern void sm_secret_forget(SmSecret *secret);

#endif							/* SM_SECRET_H */

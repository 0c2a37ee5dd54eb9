/*
 * secret.c
 *		Files that hold a token or keys.
 *
 * Called by the worker outside of transactions, and by backends that ask central; no lock.
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "secret.h"
#include "storage/fd.h"

const char *
sm_secret_read(const char *path, const char *what, SmSecret *secret)
{
	struct stat st;
	const char *problem = NULL;
	int			fd = OpenTransientFile(path, O_RDONLY | PG_BINARY | O_NONBLOCK);

	secret->len = 0;
	if (fd < 0)
		problem = errno == ENOENT ? "the file does not exist" : "the file cannot be read";
	else if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))
		problem = "it is no regular file";
	else if (st.st_mode & S_IRWXO)
		problem = "the file can be read or written by everybody; chmod 600 it";
	else if ((secret->len = read(fd, secret->text, SM_SECRET_MAX + 1)) < 0)
		problem = "the file cannot be read";
	else if (secret->len > SM_SECRET_MAX)
		problem = "the file is too long";
	if (fd >= 0)
		CloseTransientFile(fd);
	if (problem != NULL)
	{
		sm_secret_forget(secret);
		return psprintf("%s: %s", what, problem);
	}
	while (secret->len > 0 && strchr(" \t\r\n", secret->text[secret->len - 1]))
		secret->len--;
	secret->text[secret->len] = '\0';
	return secret->len > 0 ? NULL : psprintf("%s: the file is empty", what);
}

void
sm_secret_forget(SmSecret *secret)
{
	explicit_bzero(secret, sizeof(*secret));
}

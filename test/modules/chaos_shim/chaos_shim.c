/*
 * chaos_shim.c
 *		Preloaded into a server under test (LD_PRELOAD): a disk that is full and a
 *		clock that is wrong, at will and without any privilege.
 *
 * The file that SM_CHAOS_SHIM names is mapped: while disk_full is set no regular
 * file grows (ENOSPC), with 2 none of a tablespace, and clock_us is added to the time
 * of day.  Messages of the server (standard output and error) are written whatever
 * the disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

typedef struct Control
{
	int64_t		disk_full;
	int64_t		clock_us;
} Control;

static const volatile Control *control = NULL;

__attribute__((constructor))
static void
map_control(void)
{
	const char *path = getenv("SM_CHAOS_SHIM");
	int			fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void	   *map;

	if (fd < 0)
		return;
	map = mmap(NULL, sizeof(Control), PROT_READ, MAP_SHARED, fd, 0);
	if (map != MAP_FAILED)
		control = map;
	close(fd);
}

/* The next definition of a function, looked up once. */
#define REAL(result, name, ...) \
	static result (*real) (__VA_ARGS__) = NULL; \
	if (real == NULL) \
		*(void **) &real = dlsym(RTLD_NEXT, #name)

/* Is it a file of a tablespace that lies below the data directory? */
static int
is_in_tablespace(int fd)
{
	char		link[64];
	char		path[4096];
	ssize_t		len;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	len = readlink(link, path, sizeof(path) - 1);
	if (len < 0)
		return 0;
	path[len] = '\0';
	return strstr(path, "/pg_tblspc/") != NULL;
}

/* Would a write of so many bytes at this offset (-1: the current one) let the file grow, and may it not? */
static int
is_full(int fd, off_t offset, size_t len)
{
	struct stat st;

	if (control == NULL || control->disk_full == 0 || fd <= STDERR_FILENO)
		return 0;
	if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))
		return 0;
	if (offset < 0)
		offset = (fcntl(fd, F_GETFL) & O_APPEND) ? st.st_size : lseek(fd, 0, SEEK_CUR);
	if (offset + (off_t) len <= st.st_size || (control->disk_full == 2 && !is_in_tablespace(fd)))
		return 0;
	errno = ENOSPC;
	return 1;
}

static size_t
length(const struct iovec *iov, int n)
{
	size_t		sum = 0;

	for (int i = 0; i < n; i++)
		sum += iov[i].iov_len;
	return sum;
}

ssize_t
write(int fd, const void *buf, size_t len)
{
	REAL(ssize_t, write, int, const void *, size_t);
	return is_full(fd, -1, len) ? -1 : real(fd, buf, len);
}

ssize_t
pwrite(int fd, const void *buf, size_t len, off_t offset)
{
	REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
	return is_full(fd, offset, len) ? -1 : real(fd, buf, len, offset);
}

ssize_t
pwrite64(int fd, const void *buf, size_t len, off64_t offset)
{
	REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
	return is_full(fd, offset, len) ? -1 : real(fd, buf, len, offset);
}

ssize_t
pwritev(int fd, const struct iovec *iov, int n, off_t offset)
{
	REAL(ssize_t, pwritev, int, const struct iovec *, int, off_t);
	return is_full(fd, offset, length(iov, n)) ? -1 : real(fd, iov, n, offset);
}

ssize_t
pwritev64(int fd, const struct iovec *iov, int n, off64_t offset)
{
	REAL(ssize_t, pwritev64, int, const struct iovec *, int, off64_t);
	return is_full(fd, offset, length(iov, n)) ? -1 : real(fd, iov, n, offset);
}

/* These return the error. */
int
posix_fallocate(int fd, off_t offset, off_t len)
{
	REAL(int, posix_fallocate, int, off_t, off_t);
	return is_full(fd, offset, len) ? ENOSPC : real(fd, offset, len);
}

int
posix_fallocate64(int fd, off64_t offset, off64_t len)
{
	REAL(int, posix_fallocate64, int, off64_t, off64_t);
	return is_full(fd, offset, len) ? ENOSPC : real(fd, offset, len);
}

int
clock_gettime(clockid_t clock, struct timespec *ts)
{
	int			result;

	REAL(int, clock_gettime, clockid_t, struct timespec *);
	result = real(clock, ts);
	if (result == 0 && control != NULL && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
	{
		int64_t		us = ts->tv_sec * INT64_C(1000000) + ts->tv_nsec / 1000 + control->clock_us;

		ts->tv_nsec = us % 1000000 * 1000 + ts->tv_nsec % 1000;
		ts->tv_sec = us / 1000000;
	}
	return result;
}

int
gettimeofday(struct timeval *restrict tv, void *restrict tz)
{
	int			result;

	REAL(int, gettimeofday, struct timeval *restrict, void *restrict);
	result = real(tv, tz);
	if (result == 0 && control != NULL)
	{
		int64_t		us = tv->tv_sec * INT64_C(1000000) + tv->tv_usec + control->clock_us;

		tv->tv_sec = us / 1000000;
		tv->tv_usec = us % 1000000;
	}
	return result;
}

time_t
time(time_t *result)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (result != NULL)
		*result = now.tv_sec;
	return now.tv_sec;
}

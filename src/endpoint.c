/*
 * endpoint.c
 *		Central servers: is the link up, when to look again, as whom to speak.
 *
 * Worker's memory only; no transaction, no lock.
 */
#include "postgres.h"

#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/pg_prng.h"
#include "delivery.h"
#include "guc.h"
#include "secret.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* First wait before a probe; doubles up to softmobile.probe_interval. */
#define FIRST_PROBE_MS		500

static List *endpoints = NIL;

SmEndpoint *
sm_endpoint_find(const char *url)
{
	MemoryContext caller;
	SmEndpoint *endpoint;
	ListCell   *lc;
	char	   *base = pstrdup(url);

	for (size_t len = strlen(base); len > 0 && base[len - 1] == '/'; len--)
		base[len - 1] = '\0';
	foreach(lc, endpoints)
	{
		endpoint = lfirst(lc);
		if (strcmp(endpoint->url, base) == 0)
			return endpoint;
	}
	caller = MemoryContextSwitchTo(sm_delivery_cxt);
	endpoint = palloc0(sizeof(SmEndpoint));
	endpoint->url = pstrdup(base);
	endpoint->next_check = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sm_probe_interval * INT64CONST(1000));
	endpoints = lappend(endpoints, endpoint);
	MemoryContextSwitchTo(caller);
	return endpoint;
}

/*
 * When to try again after so many failures: exponential from first_ms up to
 * cap_ms, somewhere in the upper half, so that branches that lost the link
 * together do not come back together.
 */
TimestampTz
sm_endpoint_backoff(int failures, int first_ms, int cap_ms)
{
	double		ms = Min((double) cap_ms, first_ms * pow(2, Min(failures, 30)));

	ms *= 0.5 + 0.5 * pg_prng_double(&pg_global_prng_state);
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), (int64) ms);
}

/* What the worker before this one knew: stands until the first request shows otherwise. */
void
sm_endpoint_resume(SmEndpoint *endpoint, bool reachable, TimestampTz since)
{
	if (endpoint->known)
		return;
	endpoint->resumed = true;
	endpoint->reachable = reachable;
	endpoint->since = since;
}

/* Whether a request was answered, whatever it was for. */
void
sm_endpoint_note(SmEndpoint *endpoint, bool reachable)
{
	TimestampTz now = GetCurrentTimestamp();

	if (!(endpoint->known || endpoint->resumed) || endpoint->reachable != reachable)
		endpoint->since = now;
	endpoint->known = true;
	endpoint->reachable = reachable;
	endpoint->next_check = TimestampTzPlusMilliseconds(now, (reachable ? sm_sync_interval : sm_probe_interval) * INT64CONST(1000));
}

/* The link is down: probe it from now on. */
void
sm_endpoint_failed(SmEndpoint *endpoint)
{
	sm_endpoint_note(endpoint, false);
	if (!endpoint->down)
	{
		endpoint->down = true;
		endpoint->down_since = GetCurrentTimestamp();
		endpoint->probes = 0;
		ereport(LOG,
				(errmsg("softmobile: link to %s is down", endpoint->url),
				 errdetail("Events wait; the link is probed at most %d seconds apart.", sm_probe_interval)));
	}
	endpoint->next_probe = sm_endpoint_backoff(endpoint->probes, FIRST_PROBE_MS, sm_probe_interval * 1000);
	endpoint->probes++;
}

/* Any answer shows that the link is up; true when it was down. */
bool
sm_endpoint_answered(SmEndpoint *endpoint)
{
	sm_endpoint_note(endpoint, true);
	if (!endpoint->down)
		return false;
	endpoint->down = false;
	sm_probe_verify_again(endpoint);
	ereport(LOG,
			(errmsg("softmobile: link to %s is back after %ld seconds", endpoint->url,
					(long) ((GetCurrentTimestamp() - endpoint->down_since) / USECS_PER_SEC))));
	return true;
}

/* A link that is down is probed until it is back. */
bool
sm_endpoint_probe_due(SmEndpoint *endpoint, TimestampTz now)
{
	return endpoint->down && !endpoint->probing && endpoint->next_probe <= now;
}

/* The clock was set back: what was to be done is due that much earlier. */
void
sm_endpoint_set_back(TimestampTz now, int64 us)
{
	ListCell   *lc;

	foreach(lc, endpoints)
	{
		SmEndpoint *endpoint = lfirst(lc);

		endpoint->next_check -= us;
		endpoint->next_probe -= us;
		endpoint->since = Min(endpoint->since, now);
		endpoint->down_since = Min(endpoint->down_since, now);
	}
}

/* What of a file shows that it was replaced or written. */
typedef struct FileMark
{
	bool		there;
	dev_t		dev;
	ino_t		ino;
	off_t		size;
	struct timespec mtime;
	struct timespec ctime;
} FileMark;

/* The files without which central does not take a batch, as they were when last looked at. */
typedef struct WatchedFile
{
	char	  **setting;
	char	   *path;
	FileMark	mark;
} WatchedFile;

static WatchedFile watched_files[] = {
	{.setting = &sm_auth_token_file},
	{.setting = &sm_signing_key_file},
};

static FileMark
mark_file(const char *path)
{
	struct stat st;
	FileMark	mark = {0};

	if (path[0] != '\0' && stat(path, &st) == 0)
	{
		mark.there = true;
		mark.dev = st.st_dev;
		mark.ino = st.st_ino;
		mark.size = st.st_size;
		mark.mtime = st.st_mtim;
		mark.ctime = st.st_ctim;
	}
	return mark;
}

static bool
same_mark(const FileMark *a, const FileMark *b)
{
	return a->there == b->there && a->dev == b->dev && a->ino == b->ino && a->size == b->size &&
		a->mtime.tv_sec == b->mtime.tv_sec && a->mtime.tv_nsec == b->mtime.tv_nsec &&
		a->ctime.tv_sec == b->ctime.tv_sec && a->ctime.tv_nsec == b->ctime.tv_nsec;
}

/* True when the token or the signing keys are in another file than at the last call. */
bool
sm_endpoint_token_changed(void)
{
	bool		any = false;

	for (int i = 0; i < lengthof(watched_files); i++)
	{
		WatchedFile *file = &watched_files[i];
		FileMark	mark = mark_file(*file->setting);

		if (file->path != NULL && strcmp(file->path, *file->setting) == 0 && same_mark(&mark, &file->mark))
			continue;
		if (file->path != NULL)
		{
			any = true;
			pfree(file->path);
		}
		file->path = MemoryContextStrdup(sm_delivery_cxt, *file->setting);
		file->mark = mark;
	}
	return any;
}

/*
 * Reads the bearer token of a file ('': there is none, and no token).  Returns what
 * is wrong, or NULL.  Neither the token nor the path is part of the message: both
 * end up in views.
 */
const char *
sm_endpoint_token(const char *path, char **token)
{
	SmSecret	secret;
	const char *problem;

	*token = NULL;
	if (path[0] == '\0')
		return NULL;
	problem = sm_secret_read(path, "token", &secret);
	if (problem != NULL)
		return problem;
	for (ssize_t i = 0; i < secret.len && problem == NULL; i++)
		if (secret.text[i] <= ' ' || secret.text[i] >= 0x7f)
			problem = "token: the file holds more than one token";
	if (problem == NULL)
		*token = pstrdup(secret.text);
	sm_secret_forget(&secret);
	return problem;
}

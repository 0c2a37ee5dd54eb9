/*
 * slow_dns.c
 *		Preloaded into a server under test.  Names that end in ".blackhole.test"
 *		are looked up for a minute, as if no name server answered; for those in
 *		".nowhere.test" one says at once that there is no such name.
 */
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <time.h>

typedef int (*LookUp) (const char *, const char *, const struct addrinfo *, struct addrinfo **);

static int
ends_in(const char *name, const char *suffix)
{
	return name != NULL && strlen(name) > strlen(suffix) &&
		strcmp(name + strlen(name) - strlen(suffix), suffix) == 0;
}

/* PostgreSQL 16 and later hand on -fvisibility=hidden. */
__attribute__((visibility("default"))) int
getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
			struct addrinfo **result)
{
	struct timespec minute = { 60, 0 };
	LookUp		real;

	if (ends_in(node, ".blackhole.test"))
	{
		/* as a real look-up would: a signal to this thread does not end it */
		while (nanosleep(&minute, &minute) != 0)
			;
		return EAI_AGAIN;
	}
	if (ends_in(node, ".nowhere.test"))
		return EAI_NONAME;
	*(void **) &real = dlsym(RTLD_NEXT, "getaddrinfo");
	return real(node, service, hints, result);
}

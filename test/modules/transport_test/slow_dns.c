/*
 * slow_dns.c
 *		Preloaded into a server under test: names that end in ".blackhole.test"
 *		are looked up for a minute, as if no name server answered.
 */
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <time.h>

typedef int (*LookUp) (const char *, const char *, const struct addrinfo *, struct addrinfo **);

int
getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
			struct addrinfo **result)
{
	static const char suffix[] = ".blackhole.test";
	struct timespec minute = { 60, 0 };
	LookUp		real;

	if (node != NULL && strlen(node) > strlen(suffix) &&
		strcmp(node + strlen(node) - strlen(suffix), suffix) == 0)
	{
		/* as a real look-up would: a signal to this thread does not end it */
		while (nanosleep(&minute, &minute) != 0)
			;
		return EAI_AGAIN;
	}
	*(void **) &real = dlsym(RTLD_NEXT, "getaddrinfo");
	return real(node, service, hints, result);
}

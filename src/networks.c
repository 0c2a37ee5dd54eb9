/*
 * networks.c
 *		A list of networks, and whether an address is in one of them.
 *
 * Called by the check of softmobile.central_networks, in any process, and by http.c for
 * each connection that libcurl is about to make or to use; touches no table and no lock.
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include "networks.h"
#include "utils/builtins.h"
#include "utils/inet.h"

#define SEPARATORS	", \t\r\n"

/* Longest address there is, with a scope behind it. */
#define ADDRESS_MAX	80

/*
 * An address, with or without its number of bits; false when it is none.  An IPv4
 * address that is written as IPv6 (::ffff:10.0.0.1) is the IPv4 address.
 */
static bool
parse_network(const char *text, SmNetwork *network)
{
	static const unsigned char mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
	bool		v6 = strchr(text, ':') != NULL;

	memset(network, 0, sizeof(*network));
	network->family = v6 ? AF_INET6 : AF_INET;
	network->bits = pg_inet_net_pton(v6 ? PGSQL_AF_INET6 : PGSQL_AF_INET, text, network->address, -1);
	if (v6 && network->bits >= 96 && memcmp(network->address, mapped, sizeof(mapped)) == 0)
	{
		network->family = AF_INET;
		network->bits -= 96;
		memmove(network->address, network->address + 12, 4);
	}
	return network->bits >= 0;
}

/* Do two addresses have their first so many bits in common? */
static bool
same_bits(const unsigned char *a, const unsigned char *b, int bits)
{
	unsigned char mask = (unsigned char) (0xff00 >> bits % 8);

	return memcmp(a, b, bits / 8) == 0 &&
		(bits % 8 == 0 || ((a[bits / 8] ^ b[bits / 8]) & mask) == 0);
}

/* Is every bit behind the network's own zero? */
static bool
is_network(const SmNetwork *network)
{
	int			length = network->family == AF_INET6 ? 128 : 32;

	for (int bit = network->bits; bit < length; bit++)
		if (network->address[bit / 8] & (0x80 >> bit % 8))
			return false;
	return true;
}

const char *
sm_networks_parse(const char *text, SmNetworks **networks)
{
	char	   *copy = pstrdup(text);
	char	   *rest = NULL;
	const char *problem = NULL;

	*networks = palloc0(offsetof(SmNetworks, network) + (strlen(text) / 2 + 1) * sizeof(SmNetwork));
	for (char *word = strtok_r(copy, SEPARATORS, &rest); word && !problem; word = strtok_r(NULL, SEPARATORS, &rest))
	{
		SmNetwork  *network = &(*networks)->network[(*networks)->n++];

		if (strlen(word) > ADDRESS_MAX || !parse_network(word, network))
			problem = psprintf("\"%.*s\" is neither an IP address nor a network.", ADDRESS_MAX, word);
		else if (!is_network(network))
			problem = psprintf("\"%s\" has bits set behind its network.", word);
	}
	pfree(copy);
	if (problem != NULL || (*networks)->n == 0)
	{
		pfree(*networks);
		*networks = NULL;
	}
	return problem;
}

static bool
hold(const SmNetworks *networks, const SmNetwork *address)
{
	for (int i = 0; i < networks->n; i++)
		if (networks->network[i].family == address->family &&
			same_bits(networks->network[i].address, address->address, networks->network[i].bits))
			return true;
	return false;
}

bool
sm_networks_hold_text(const SmNetworks *networks, const char *address)
{
	char		bare[ADDRESS_MAX + 1];
	SmNetwork	parsed;

	/* without the scope of a link-local address */
	strlcpy(bare, address, sizeof(bare));
	bare[strcspn(bare, "%")] = '\0';
	return parse_network(bare, &parsed) && hold(networks, &parsed);
}

bool
sm_networks_hold(const SmNetworks *networks, const struct sockaddr *address)
{
	char		text[INET6_ADDRSTRLEN];
	const void *bytes;

	if (address->sa_family == AF_INET)
		bytes = &((const struct sockaddr_in *) address)->sin_addr;
	else if (address->sa_family == AF_INET6)
		bytes = &((const struct sockaddr_in6 *) address)->sin6_addr;
	else
		return false;
	return inet_ntop(address->sa_family, bytes, text, sizeof(text)) != NULL && sm_networks_hold_text(networks, text);
}

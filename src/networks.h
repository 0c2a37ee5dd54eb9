/*
 * networks.h
 *		A list of networks, and whether an address is in one of them.
 */
#ifndef SM_NETWORKS_H
#define SM_NETWORKS_H

#include <sys/socket.h>

typedef struct SmNetwork
{
	int			family;			/* AF_INET or AF_INET6 */
	int			bits;
	unsigned char address[16];
} SmNetwork;

typedef struct SmNetworks
{
	int			n;
	SmNetwork	network[FLEXIBLE_ARRAY_MEMBER];
} SmNetworks;

/*
 * NULL when the text is a list of addresses and networks, such as '10.0.0.0/8, 192.0.2.7';
 * else what is wrong with it.  The list is palloc'd; NULL when the text is empty.
 */
extern const char *sm_networks_parse(const char *text, SmNetworks **networks);

/* These two neither allocate nor throw. */
extern bool sm_networks_hold(const SmNetworks *networks, const struct sockaddr *address);
extern bool sm_networks_hold_text(const SmNetworks *networks, const char *address);

#endif							/* SM_NETWORKS_H */
